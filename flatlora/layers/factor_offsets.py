"""Run a forward at (A + E_A, B + E_B), with the further low-rank products of the method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from ..methods.base import FactorOffset
from .module_weights import moved_weight

if TYPE_CHECKING:
    from .flat_layer import FlatLayer


def forward(layer: FlatLayer, peft_forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """peft's forward at the moved factors. The parameters are not written."""
    run = layer.perturbation
    method = run.settings.method
    assert isinstance(method, FactorOffset)
    with ExitStack() as stack:
        for part in layer.merged_parts():
            for (factor, adapter), offset in method.offsets(part, run).items():
                stack.enter_context(moved_weight(getattr(part, factor)[adapter], offset))
        out = peft_forward(x, *args, **kwargs)
    for A, B, scaling in method.extra_products(layer, x, run):
        out = out + (F.linear(F.linear(x, A), B) * scaling).to(out.dtype)
    return out
