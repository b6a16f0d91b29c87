"""Run peft's forward with a base layer that computes its product with W + eps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..ops import perturbed_conv, perturbed_linear
from .module_weights import replaced_forward
from .supported import CONVOLUTIONS

if TYPE_CHECKING:
    from .flat_layer import FlatLayer


def forward(layer: FlatLayer, peft_forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """peft's forward. The hooks of the base layer run, and may provide its weight."""
    base: Any = layer.get_base_layer()
    with replaced_forward(base, lambda x: product(layer, x, base.weight, base.bias, *layer.noise())):
        return peft_forward(x, *args, **kwargs)


def product(layer: FlatLayer, x: Tensor, weight: Tensor, bias: Tensor | None, row_std: Tensor, key: Tensor) -> Tensor:
    """The base layer's product of x with `weight` + eps."""
    base: Any = layer.get_base_layer()
    backend = layer.perturbation.settings.backend
    if not isinstance(base, CONVOLUTIONS):
        weight = weight.T if isinstance(base, Conv1D) else weight
        return perturbed_linear(x, weight, bias, row_std, key, layer.stream, backend=backend)
    padding: Any = base.padding
    if isinstance(padding, str) or base.padding_mode != "zeros":
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        x = F.pad(x, base._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(base.stride)
    geometry: Any = {"stride": base.stride, "padding": padding, "dilation": base.dilation, "groups": base.groups}
    return perturbed_conv(x, weight, bias, row_std, key, layer.stream, backend=backend, **geometry)
