"""Bi-LoRA (arXiv 2508.19564): a second low-rank module climbs while the first descends, in the same backward.

The forward runs at W + s B_1 A_1 + s B_2 A_2. After each step, with c = sqrt(sum over layers of ||B_2 A_2||_F^2), both
factors of module 2 are scaled by sqrt(rho_t / c) if c > rho_t. Module 2 is not saved and not in `parameters()`: an
optimizer of the same class and options as the user's, `maximize=True`, moves A_2 at the learning rate of A_1 and B_2 at
that of B_1.

What treats the gradients of `parameters()` does not reach module 2: it is not clipped, under DDP each process has a
module of its own, and under a GradScaler its gradients keep the scale, which Adam and its kin do not notice and SGD
does.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor
from torch.optim import AdamW, Optimizer

from ..config import PerturbedLoraConfig
from ..ops import perturb_weight
from ..ops.philox import mix_rank
from ..utils.arguments import checker, integer
from .factors import FactorMethod

A2, B2 = "ascent_A", "ascent_B"


@dataclass
class BiLoraConfig(PerturbedLoraConfig):
    """
    Bi-LoRA (arXiv 2508.19564): one pass a step. Nothing to call in the loop.

    Args:
        rho (`float`):
            Largest Frobenius norm of B_2 A_2 over all layers together. Default 0.05, the paper's (0.1 for Qwen and
            SuperGLUE).
        ascent_r (`int`):
            Rank of module 2. Default 8, the paper's.
        seed (`int`):
            Of module 2's initial A. Torch's generators are not used.
    """

    ascent_r: int = field(default=8, metadata={"help": "Rank of the module that climbs.", "check": checker(integer, 1)})
    seed: int = field(default=0, metadata={"help": "Seed of the initial A of the module that climbs."})

    def make_method(self) -> BiLora:
        return BiLora(self.ascent_r)


@dataclass(frozen=True)
class BiLora(FactorMethod):
    transforms = False  # a transform gives no gradients to module 2
    r: int = 8

    def unsupported(self, layer: Any, adapter: str) -> str | None:
        reason = super().unsupported(layer, adapter)
        if reason is None and not isinstance(layer.lora_A[adapter], torch.nn.Linear):
            reason = "Bi-LoRA is not defined for convolutions"
        elif reason is None and isinstance(layer, (MultiheadAttention, ParamWrapper)):
            reason = "Bi-LoRA adds its product to the output, which must be linear in the input"
        return reason

    def adopt(self, layer: Any, adapter: str) -> None:
        """A_2 has the variance that LoRA gives to A, 1/(3n); B_2 is zero."""
        state, like = layer.perturbation, layer.lora_A[adapter].weight
        if like.is_meta or (A2, adapter) in layer.offsets:
            return
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        n, m = layer.lora_A[adapter].in_features, layer.lora_B[adapter].out_features
        zero, row_std = torch.zeros(self.r, n, dtype=dtype), torch.full((self.r,), 1 / math.sqrt(3 * n), dtype=dtype)
        key = torch.tensor([mix_rank(state.seed, 0), 0])
        A = perturb_weight(zero, row_std, key, layer.stream)
        layer.offsets[A2, adapter] = A.to(like.device).requires_grad_()
        layer.offsets[B2, adapter] = torch.zeros(m, self.r, dtype=dtype, device=like.device).requires_grad_()

    def forward(self, layer: Any, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = plain(x, *args, **kwargs)
        for adapter in layer.active_flat_adapters():
            # in the model's precision: x is saved for the backward anyway, a cast of it would be one more copy
            A, B = (_follow(layer, (factor, adapter), x.device).to(x.dtype) for factor in (A2, B2))
            out = out + (F.linear(F.linear(x, A), B) * layer.scaling[adapter]).to(out.dtype)
        return out

    def before_step(self, state: Any, optimizer: Optimizer) -> None:
        """Climb. Gradients that are not finite are an overflow: module 2 then stays."""
        tensors = [tensor for _, layer in state.flat_layers() for tensor in layer.offsets.values()]
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        if gradients and torch.nn.utils.get_total_norm(gradients).isfinite():
            _climber(state, optimizer).step()
        for tensor in tensors:
            tensor.grad = None

    @torch.no_grad()
    def after_step(self, state: Any, optimizer: Optimizer) -> None:
        """Project: c <= rho_t."""
        pairs = [
            (layer.offsets[A2, adapter], layer.offsets[B2, adapter])
            for _, layer in state.flat_layers()
            for adapter in layer.active_flat_adapters()
        ]
        if not pairs:
            return
        squares = [((B.T @ B) * (A @ A.T)).sum().double() for A, B in pairs]
        c = torch.stack(squares).sum().clamp_min(0).sqrt()
        scale = torch.where(c > state.rho_t, (state.rho_t / c.clamp_min(1e-300)).sqrt(), 1.0)
        for A, B in pairs:
            A.mul_(scale)
            B.mul_(scale)


def _follow(layer: Any, key: tuple[str, str], device: torch.device) -> Tensor:
    """A factor of module 2, brought to where the layer is by now: `model.to(device)` does not know of it."""
    tensor, state = layer.offsets[key], layer.perturbation
    if tensor.device != device:
        tensor = layer.offsets[key] = tensor.detach().to(device).requires_grad_()
        if state.climber is not None:  # it holds the old one: it is made again, with the state that it has
            state.climber_state, state.climber = state.climber.state_dict(), None
    return tensor


def _climber(state: Any, optimizer: Optimizer) -> Optimizer:
    """The optimizer of module 2, each factor with the options that the user's has just now for module 1's."""
    followed = _followed(state, optimizer)
    if any(group["lr"] is None for group, _ in followed):
        raise RuntimeError(
            "Bi-LoRA's module 2 climbs at the learning rate at which module 1 descends, and this "
            f"{type(optimizer).__name__} has lr=None: give it one (Adafactor: relative_step=False, lr=...)"
        )
    if state.climber is None:
        climbs = "maximize" in optimizer.defaults
        kind = type(optimizer) if climbs else AdamW  # whose options have other meanings
        known = inspect.signature(kind).parameters
        names = [name for name in optimizer.defaults if name in known] if climbs else ["lr"]
        groups = [
            {"params": tensors, **{name: group[name] for name in names}, "maximize": True}
            for group, tensors in followed
        ]
        state.climber = kind(groups, **{"lr": followed[0][0]["lr"], "maximize": True})
        if state.climber_state is not None:
            state.climber.load_state_dict(state.climber_state)
    for own, (group, _) in zip(state.climber.param_groups, followed, strict=True):
        own["lr"] = group["lr"]
    return state.climber


def _followed(state: Any, optimizer: Optimizer) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """The user's parameter groups, each with the factors of module 2 whose counterparts are in it. Where a factor of
    module 1 is frozen, its counterpart goes with the other."""
    place = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    tensors: dict[int, list[Tensor]] = defaultdict(list)
    for _, layer in state.flat_layers():
        for (name, adapter), tensor in layer.offsets.items():
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            first, second = (A, B) if name == A2 else (B, A)
            followed = first if first in place else second
            if followed in place:
                tensors[place[followed]].append(tensor)
    return [(optimizer.param_groups[i], tensors[i]) for i in sorted(tensors)]
