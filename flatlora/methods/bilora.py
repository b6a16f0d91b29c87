"""Bi-LoRA (arXiv 2508.19564): a second low-rank product ascends while the first descends, in the same backward.

The forward runs at W + s B A + s B_2 A_2. After each step, with c = sqrt(sum over layers of ||B_2 A_2||_F^2), both
ascent factors are scaled by sqrt(rho_t / c) if c > rho_t. A_2 and B_2 are not saved with the adapter and are not in
`parameters()`. An optimizer of the same class and options as the user's, with `maximize=True`, updates A_2 with the
learning rate of A, and B_2 with that of B.

What changes the gradients of `parameters()` does not apply to the ascent factors: they are not clipped, each process of
DDP has its own, and with a GradScaler their gradients keep the scale. Adam-like optimizers do not depend on the scale;
SGD does. Where A and B are divided among processes (FSDP, ZeRO), the gradients of A_2 and B_2 are averaged, so that all
processes have the same ascent factors.

The gradients of A_2 and B_2 count while A or B has one, so `optimizer.zero_grad()` drops them too. That is looked at
where a layer's forward begins, and with several processes, where gradients of A and B may be kept elsewhere between two
backwards, at the optimizer's step alone.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..config import PerturbedLoraConfig
from ..ops import perturb_weight
from ..ops.philox import mix_rank
from ..utils.arguments import WrongType, checker, integer, shown
from ..utils.arguments import tensor as check_tensor
from .base import AdaptedLayer, FactorOffset, MethodState, TrainingRun

A2, B2 = "ascent_A", "ascent_B"  # names of the ascent factors in `layer.offsets`
NamedTensors = dict[str, Tensor]


@dataclass
class BiLoraConfig(PerturbedLoraConfig):
    """Configuration of Bi-LoRA (arXiv 2508.19564). One pass per step; the loop calls nothing.

    Args:
        rho (`float`):
            Largest Frobenius norm of B_2 A_2 over all layers together. Default 0.05, the paper's (0.1 for Qwen and
            SuperGLUE).
        ascent_r (`int`):
            Rank of the ascent factors. Default 8, the paper's.
        seed (`int`):
            Seed of the initial A_2. Torch's generators are not used.
    """

    ascent_r: int = field(default=8, metadata={"help": "Rank of the ascent factors.", "check": checker(integer, 1)})
    seed: int = field(default=0, metadata={"help": "Seed of the initial ascent factor A_2."})

    def make_method(self) -> BiLora:
        return BiLora(self.ascent_r)


class AscentOptimizer(MethodState):
    """The optimizer of the ascent factors, created when they or the class of the user's optimizer have changed.

    It holds those of all adapters, so that an adapter that another optimizer trains for a while keeps its moments.
    """

    def __init__(self) -> None:
        self.optimizer: Optimizer | None = None
        self._loaded: dict[str, Any] | None = None  # its state, until it is created

    def state_dict(self) -> dict[str, Any] | None:
        return self._loaded if self.optimizer is None else self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.optimizer, self._loaded = None, state

    def recreate(self) -> None:
        """Create it again at the next step, with the same state: an ascent factor has been replaced."""
        if self.optimizer is not None:
            self.load_state_dict(self.optimizer.state_dict())

    def check(self, state: Any, shapes: Collection[tuple[int, ...]]) -> dict[str, Any] | None:
        if state is None:
            return None
        is_mapping = isinstance(state, Mapping)
        groups, moments = (state.get("param_groups"), state.get("state")) if is_mapping else (None, None)
        if not (
            isinstance(groups, list) and isinstance(moments, Mapping) and all(_is_group(group) for group in groups)
        ):
            raise WrongType(f"method must be None or the state_dict() of an optimizer, got {shown(state)}")
        places = [place for group in groups for place in group["params"]]
        if len(places) > len(shapes) or not set(moments) <= set(places):
            raise ValueError(f"method must be of the {len(shapes)} ascent factors of this model, got {len(places)}")
        for place, kept in moments.items():
            if not isinstance(kept, Mapping):
                raise WrongType(f"method['state'][{place!r}] must be a mapping, got {shown(kept)}")
            for key, moment in kept.items():
                if isinstance(moment, Tensor):
                    _check_moment(f"method['state'][{place!r}][{key!r}]", moment, set(shapes))
        return dict(state)

    def step(self, run: TrainingRun, optimizer: Optimizer) -> None:
        """Ascend, with the class and the options that the user's optimizer has now."""
        groups, others = _corresponding_groups(run, optimizer)
        if not groups:
            return
        if any(group["lr"] is None for group, _ in groups):
            raise RuntimeError(
                "Bi-LoRA updates its ascent factors with the learning rate of A and B, and this "
                f"{type(optimizer).__name__} has lr=None: set one (Adafactor: relative_step=False, lr=...)"
            )
        for tensor in others.values():
            tensor.grad = None  # the user's optimizer does not train these adapters
        tensors = [*(tensors for _, tensors in groups), *([others] if others else [])]
        options = [_options(optimizer, group) for group, _ in groups]
        own = self._follow(_class_like(optimizer), tensors, options)
        for own_group, now in zip(own.param_groups, options, strict=False):  # the last may be that of `others`
            own_group.update(own.defaults | now)
        own.step()

    def _follow(self, kind: Any, groups: list[NamedTensors], options: list[dict[str, Any]]) -> Optimizer:
        """The optimizer of this class and of these tensors: the present one, or a new one with its moments."""
        former = self.optimizer if type(self.optimizer) is kind else None
        if former is not None and _identities(former) == [[id(t) for t in group.values()] for group in groups]:
            return former
        # an optimizer that loads this inside its own state (a Trainer's) keeps strings as keys only
        own = [{"params": [*group.values()], "names": {name: i for i, name in enumerate(group)}} for group in groups]
        for group, given in zip(own, options, strict=False):  # before the state is loaded: `fused` says where it lies
            group.update(given)
        made: Optimizer = kind(own, lr=options[0]["lr"], maximize=True)
        if former is not None:
            tensors = [tensor for group in groups for tensor in group.values()]
            made.state.update({tensor: former.state[tensor] for tensor in tensors if tensor in former.state})
        elif self._loaded is not None:
            made.load_state_dict({**made.state_dict(), "state": _moments(self._loaded, groups)})
        self.optimizer, self._loaded = made, None
        return made


@dataclass(frozen=True)
class BiLora(FactorOffset):
    """The method of [`BiLoraConfig`]."""

    transforms: ClassVar[bool] = False  # a transform computes no gradients of the ascent factors
    r: int = 8

    def unsupported(self, layer: Any, adapter: str) -> str | None:
        reason = super().unsupported(layer, adapter)
        if reason is None and not isinstance(layer.lora_A[adapter], nn.Linear):
            reason = "Bi-LoRA is not defined for convolutions"
        elif reason is None and isinstance(layer, (MultiheadAttention, ParamWrapper)):
            reason = "Bi-LoRA adds its product to the output, which must be linear in the input"
        return reason

    def make_state(self) -> AscentOptimizer:
        return AscentOptimizer()

    def init_adapter(self, layer: AdaptedLayer, adapter: str, run: TrainingRun) -> None:
        """A_2 has the variance of LoRA's initial A, 1/(3n); B_2 is zero."""
        like = layer.lora_A[adapter].weight
        if (A2, adapter) in layer.offsets:
            return
        # A may get its memory later (low_cpu_mem_usage, offloading); the first forward moves the ascent factors to it
        device = torch.device("cpu") if like.is_meta else like.device
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        n, m = layer.lora_A[adapter].in_features, layer.lora_B[adapter].out_features
        zero = torch.zeros(self.r, n, dtype=dtype, device="cpu")
        row_std = torch.full((self.r,), 1 / math.sqrt(3 * n), dtype=dtype, device="cpu")
        key = torch.tensor([mix_rank(run.seed, 0), 0], device="cpu")
        A = perturb_weight(zero, row_std, key, layer.stream)
        layer.offsets[A2, adapter] = A.to(device).requires_grad_()
        layer.offsets[B2, adapter] = torch.zeros(m, self.r, dtype=dtype, device=device).requires_grad_()

    def extra_products(self, layer: AdaptedLayer, x: Tensor, run: TrainingRun) -> list[tuple[Tensor, Tensor, float]]:
        made = []
        for adapter in layer.active_flat_adapters():
            if torch.is_grad_enabled() and not _has_processes():
                _drop_without_descent(layer, adapter, run)
            # in the precision of x, which is saved for the backward anyway: a cast of x would be one more copy
            A, B = (_on_device(layer, (factor, adapter), x.device, run).to(x.dtype) for factor in (A2, B2))
            made.append((A, B, layer.scaling[adapter]))
        return made

    def before_step(self, run: TrainingRun, optimizer: Optimizer) -> None:
        """Ascend, unless gradients are not finite because of an overflow."""
        tensors = []
        for _, layer in run.flat_layers():
            for adapter in {adapter for _, adapter in layer.offsets}:
                _drop_without_descent(layer, adapter, run)
            tensors += layer.offsets.values()
        if tensors:
            run.whole.average_gradients(next(layer.lora_A.parameters()), tensors)
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        if gradients and torch.nn.utils.get_total_norm(gradients).isfinite():
            run.method_state.step(run, optimizer)
        for tensor in tensors:
            tensor.grad = None

    @torch.no_grad()
    def after_step(self, run: TrainingRun, optimizer: Optimizer) -> None:
        """Project: c <= rho_t."""
        pairs = [
            (layer.offsets[A2, adapter], layer.offsets[B2, adapter])
            for _, layer in run.flat_layers()
            for adapter in layer.active_flat_adapters()
        ]
        if not pairs:
            return
        squares = [((B.T @ B) * (A @ A.T)).sum().double() for A, B in pairs]
        c = torch.stack(squares).sum().clamp_min(0).sqrt()
        scale = torch.where(c > run.rho_t, (run.rho_t / c.clamp_min(1e-300)).sqrt(), 1.0)
        for A, B in pairs:
            A.mul_(scale)
            B.mul_(scale)


def _has_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _drop_without_descent(layer: AdaptedLayer, adapter: str, run: TrainingRun) -> None:
    """Drop the gradients of ascent factors whose A and B have none: the batch that they are of was discarded."""
    descent = [factor[adapter].weight for factor in (layer.lora_A, layer.lora_B)]
    # a weight that is computed in each forward (parametrized, a replica) holds none
    if all(isinstance(p, nn.Parameter) and not run.whole.has_gradient(p) for p in descent):
        for name in (A2, B2):
            layer.offsets[name, adapter].grad = None


def _on_device(layer: AdaptedLayer, key: tuple[str, str], device: torch.device, run: TrainingRun) -> Tensor:
    """An ascent factor on the device of the layer: `model.to(device)` does not move it."""
    tensor = layer.offsets[key]
    if tensor.device != device:
        tensor = layer.offsets[key] = tensor.detach().to(device).requires_grad_()
        run.method_state.recreate()
    return tensor


def _class_like(optimizer: Optimizer) -> Any:
    """The class of the user's optimizer; AdamW if it cannot maximize."""
    return type(optimizer) if "maximize" in optimizer.defaults else AdamW


def _options(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The options of one of the user's groups that an optimizer of `_class_like` takes, and that it maximizes."""
    known = inspect.signature(type(optimizer)).parameters
    # the options of another class have other meanings
    names = [name for name in optimizer.defaults if name in known] if "maximize" in optimizer.defaults else ["lr"]
    return {**{name: group[name] for name in names}, "maximize": True}


def _identities(optimizer: Optimizer) -> list[list[int]]:
    """The identities of an optimizer's tensors, by group."""
    return [[id(tensor) for tensor in group["params"]] for group in optimizer.param_groups]


def _moments(state: dict[str, Any], groups: list[NamedTensors]) -> dict[int, Any]:
    """What a saved optimizer keeps for each of these tensors, by its place. A file of 0.1.0 and before has no names."""
    saved: list[dict[str, Any]] = state["param_groups"]
    if not all("names" in group for group in saved):
        sizes = [len(group["params"]) for group in saved]
        if sizes != [len(group) for group in groups[: len(sizes)]]:
            raise ValueError("the saved state of Bi-LoRA's ascent is of other parameter groups than this optimizer's")
        return dict(state["state"])
    names = [name for group in groups for name in group]
    places = {name: group["params"][i] for group in saved for name, i in group["names"].items()}
    return {i: state["state"][places[name]] for i, name in enumerate(names) if places.get(name) in state["state"]}


def _corresponding_groups(
    run: TrainingRun, optimizer: Optimizer
) -> tuple[list[tuple[dict[str, Any], NamedTensors]], NamedTensors]:
    """The user's parameter groups, each with the ascent factors that correspond to the factors in it; and the others.

    If a factor is frozen, its ascent factor goes to the group of the other one.
    """
    found = run.whole.groups(optimizer)
    place = {p: i for i, group in enumerate(found) for p in group["params"]}
    tensors: dict[int, NamedTensors] = defaultdict(dict)
    for layer_name, layer in run.flat_layers():
        for (name, adapter), tensor in layer.offsets.items():
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            first, second = (A, B) if name == A2 else (B, A)
            own = place.get(first, place.get(second, -1))
            tensors[own][f"{layer_name}.{name}.{adapter}"] = tensor
    others = tensors.pop(-1, {})
    return [(found[i], tensors[i]) for i in sorted(tensors)], others


def _is_group(group: Any) -> bool:
    """Whether this may be a parameter group of a saved optimizer: places of tensors, and indices of these by name."""
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
        return False
    names = group.get("names", {})
    return isinstance(names, Mapping) and all(i in range(len(group["params"])) for i in names.values())


def _check_moment(name: str, moment: Tensor, shapes: set[tuple[int, ...]]) -> None:
    """A moment has the shape of its factor, or is a statistic of rows, columns or steps."""
    check_tensor(name, moment)
    if moment.ndim == 2 and tuple(moment.shape) not in shapes:
        expected = " or ".join(map(str, sorted(shapes)))
        raise ValueError(f"{name} must have shape {expected}, got {tuple(moment.shape)}")
    if not torch.isfinite(moment).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity in it")
