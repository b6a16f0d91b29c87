"""Trace a linear layer with `torch.compile`: a custom operator computes the product with W + eps.

Compiled code contains the address of a layer, and looks up what changes from step to step when it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from ..methods.base import WeightNoise
from ..ops.custom_ops import compiled_perturbed_linear
from ..ops.registry import LAYERS

if TYPE_CHECKING:
    from .flat_layer import FlatLayer


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def note_compiling(number: int) -> None:
    """Note that a layer of the perturbation with this number is traced. It is not called when the code runs.

    The argument is the same for all layers of a model, because it becomes a constant of the graph that they share.
    """
    perturbations = (getattr(layer, "perturbation", None) for layer in list(LAYERS.values()))
    found: Any = next(p for p in perturbations if getattr(p, "number", 0) == number)
    found.diagnostics.compiled = True


def takes(layer: FlatLayer) -> bool:
    """Whether this path takes the layer: `lora.Linear` over `nn.Linear` with noise, no variant, no hooks."""
    base = layer.get_base_layer()
    hooked = base._forward_pre_hooks or base._forward_hooks or "forward" in base.__dict__
    if hooked or not isinstance(layer.perturbation.settings.method, WeightNoise):
        return False
    linear = layer.peft_class is lora.Linear and type(base).forward is layer._base_forward is nn.Linear.forward
    return linear and not any(name in layer.lora_variant for name in layer.active_lora_adapters())


def forward(layer: FlatLayer, x: Tensor) -> Tensor:
    """The perturbed forward, in operators that `torch.compile` keeps in one graph."""
    base: Any = layer.get_base_layer()
    backend = layer.perturbation.settings.backend
    row_std, key = torch.ops.flatlora.layer_noise(base.weight.detach(), layer.address)
    out = compiled_perturbed_linear(x, base.weight, base.bias, row_std, key, layer.address, backend=backend)
    dtype = out.dtype
    for name in layer.active_lora_adapters():
        x = layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype)
        out = out + layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x))) * layer.scaling[name]
    return out.to(dtype)
