"""Compute a linear layer with one adapter in one autograd node, with or without noise in W."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..methods.base import FactorOffset, WeightNoise
from ..ops import RowNoise, lora_linear, makes_norms
from . import factor_offsets
from .row_norms import compute_row_norms, merged_source

if TYPE_CHECKING:
    from .flat_layer import FlatLayer


class Operands(NamedTuple):
    """A linear layer and its one adapter."""

    adapter: str
    base: Any  # nn.Linear or Conv1D
    A: nn.Linear
    B: nn.Linear

    def rows(self) -> Tensor:
        """W with one output per row, (m, n): Conv1D stores (n, m)."""
        weight: Tensor = self.base.weight
        return weight.T if isinstance(self.base, Conv1D) else weight


def operands(layer: FlatLayer) -> Operands | None:
    """The operands of this path, or None for a layer that it does not take.

    It takes a linear layer with one adapter of two matrices, without a variant and without hooks on these modules.
    """
    names = layer.active_lora_adapters()
    modules: Any = layer._modules  # spares the lookups of nn.Module.__getattr__
    if len(names) != 1 or layer.lora_variant or layer.peft_class is not lora.Linear:
        return None
    base = modules["base_layer"]
    A, B = (modules[factor]._modules.get(names[0]) for factor in ("lora_A", "lora_B"))
    if type(base) not in (nn.Linear, Conv1D) or type(base.weight) not in (nn.Parameter, Tensor):
        return None
    if not (type(A) is type(B) is nn.Linear and A.bias is B.bias is None):
        return None
    hooked = _has_hooks(base) or _has_hooks(A) or _has_hooks(B)
    return None if hooked else Operands(names[0], base, A, B)


def forward(layer: FlatLayer, operands: Operands, x: Tensor) -> Any:
    """The perturbed forward of the layer."""
    if isinstance(layer.perturbation.settings.method, FactorOffset):
        return factor_offsets.forward(layer, lambda x: _lora_linear(layer, operands, x), x)
    return _with_noise(layer, operands, x)


def _with_noise(layer: FlatLayer, operands: Operands, x: Tensor) -> Tensor:
    """If the row norms are not known and the kernel can compute them, it does so in the pass that adds the noise."""
    perturbation, weight = layer.perturbation, operands.rows()
    method = perturbation.settings.method
    assert isinstance(method, WeightNoise)
    key, _ = perturbation.draw(x.device)
    source = merged_source(layer, [operands.adapter], [operands.base.weight, operands.A.weight, operands.B.weight])
    norms = layer._norms.find("merged", source)
    in_kernel = norms is None and method.is_relative_to_row_norms and makes_norms(weight, perturbation.settings.backend)
    if in_kernel:
        norms = scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    else:
        norms = layer._norms.get_or_compute("merged", source, lambda: compute_row_norms(layer))
        scale = method.row_scale(norms)
    noise = RowNoise(scale, layer.relative_std(weight.shape[1], weight.device), key, layer.stream, in_kernel)
    out = _lora_linear(layer, operands, x, noise)
    if in_kernel:
        layer._norms.keep("merged", source, norms)
    return out


def _lora_linear(layer: FlatLayer, operands: Operands, x: Tensor, noise: RowNoise | None = None) -> Tensor:
    adapter, base, A, B = operands.adapter, operands.base, operands.A.weight, operands.B.weight
    dropout: Any = layer.lora_dropout[adapter]
    dropped = None
    if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
        dropped = dropout(layer._cast_input_dtype(x, A.dtype))
    scaling, backend = float(layer.scaling[adapter]), layer.perturbation.settings.backend
    return lora_linear(
        x, operands.rows(), base.bias, A, B, scaling, noise, dropped=dropped, backend=backend, owner=layer.number
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in module.__dict__
