"""What compiled code knows of a flat layer: its address. What changes from step to step is looked up at run time."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from .ops.library import OBSERVERS
from .ops.norms import norm_dtype
from .ops.products import autocast_dtype

LAYERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # by number
_numbers = itertools.count()


def enrol(layer: Any) -> int:
    """Give a flat layer its number."""
    number = next(_numbers)
    LAYERS[number] = layer
    return number


def leave(layer: Any) -> None:
    """The layer is no longer flat."""
    LAYERS.pop(layer.__dict__.get("number", -1), None)


@torch.compiler.assume_constant_result
def note_compiling(number: int) -> None:
    """Called while a flat layer of the perturbation of this number is compiled, not when its code runs."""
    OBSERVERS[number].compiled = True


@torch.library.custom_op("flatlora::layer_noise", mutates_args=())
def _layer_noise(weight: Tensor, address: Tensor) -> tuple[Tensor, Tensor]:
    """`FlatLayer.noise` at the run time of compiled code. `address` is (number of the layer, its stream, number of its
    perturbation): a tensor, so that equal layers share one compiled graph."""
    row_std, key = LAYERS[int(address[0])].noise_of_compiled_forward()
    return row_std.clone(), key.clone()


@_layer_noise.register_fake
def _(weight: Tensor, address: Tensor) -> tuple[Tensor, Tensor]:
    row_std = weight.new_empty(weight.shape[0], dtype=norm_dtype(weight.dtype))
    return row_std, torch.empty(2, dtype=torch.int64, device=weight.device if weight.device.type == "cuda" else "cpu")


def compiled_perturbed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, row_std: Tensor, key: Tensor, address: Tensor, *, backend: str
) -> Tensor:
    """`perturbed_linear` of a layer in compiled code, as an operator."""
    dtype = autocast_dtype(x.device.type, weight.dtype)
    if dtype != weight.dtype:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return torch.ops.flatlora.perturbed_linear(x, weight, bias, row_std, key, address, dtype, backend)
