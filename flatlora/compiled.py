"""Mark the perturbation of a layer as compiled while `torch.compile` traces the layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .ops.registry import LAYERS


@torch.compiler.assume_constant_result
def note_compiling(number: int) -> None:
    """Called while a flat layer of the perturbation of this number is compiled, not when its code runs.

    The argument is the same for all layers of a model, since it becomes a constant of their shared graph.
    """
    states: Iterator[Any] = (getattr(layer, "perturbation", None) for layer in list(LAYERS.values()))
    next(state for state in states if getattr(state, "number", 0) == number).compiled = True
