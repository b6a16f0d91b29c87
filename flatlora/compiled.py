"""What compiled code knows of a flat layer: its number. What changes from step to step is looked up at run time."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from .ops.library import OBSERVERS
from .ops.norms import norm_dtype

LAYERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # by number
_numbers = itertools.count()


def enrol(layer: Any) -> int:
    """Give a flat layer its number."""
    number = next(_numbers)
    LAYERS[number] = layer
    return number


@torch.compiler.assume_constant_result
def note_compiling(number: int) -> None:
    """Called while a flat layer of the perturbation of this number is compiled, not when its code runs."""
    OBSERVERS[number].compiled = True


@torch.library.custom_op("flatlora::layer_noise", mutates_args=())
def _layer_noise(weight: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """`FlatLayer.noise` at the run time of compiled code."""
    row_std, key = LAYERS[number].noise()
    return row_std.clone(), key.clone()


@_layer_noise.register_fake
def _(weight: Tensor, number: int) -> tuple[Tensor, Tensor]:
    row_std = weight.new_empty(weight.shape[0], dtype=norm_dtype(weight.dtype))
    return row_std, LAYERS[number].perturbation.empty_key(weight.device)
