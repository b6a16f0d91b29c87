"""Layers whose frozen weight is quantized.

| base layer                | how eps enters                                                               |
| ------------------------- | ---------------------------------------------------------------------------- |
| bitsandbytes, 4 bits      | in the product, as for a dense layer, see `fused.py`                         |
| the same with hooks       | peft's forward, with a base layer that computes x (W + eps)^T                |
| the same with other DoRA  | x eps^T is added, see `additive.py`                                          |
| all others                | x eps^T is added. Some also quantize x (8 bits), some have their own kernels: |
|                           | the base product is theirs, bit for bit                                      |

W is dequantized for the length of a product, block by block where the format allows it, and again in backward.
``||W_i||^2`` is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops import rebuilt_linear
from . import additive
from .flat_layer import FlatLayer
from .module_weights import replaced_forward
from .quantized_rows import FourBitRows
from .weights import LayerWeights


class QuantizedWeights(LayerWeights):
    """W, A and B of a layer whose W is quantized."""

    __slots__ = ()

    @property
    def anchor(self) -> Any:
        return self.base._parameters.get("weight", self.base)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.tensors(self.layer.active_lora_adapters())[-1].device
        return device

    @property
    def columns(self) -> int:
        return self.layer.in_features

    def is_dense(self) -> bool:
        return False

    def tensors(self, adapters: list[str]) -> list[Any]:
        factors = (self.layer.lora_magnitude_vector, self.layer.lora_A, self.layer.lora_B)
        return [factor[name].weight for name in adapters for factor in factors if name in factor]


class QuantizedLayer(FlatLayer):
    """A flat layer over a quantized linear layer."""

    weights_class: ClassVar[type[LayerWeights]] = QuantizedWeights

    def noisy_forward(self, peft_forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        self.__dict__["input_dtype"] = x.dtype
        four_bit = self.peft_class.__name__ == "Linear4bit" and self.weights.magnitudes() is None
        if four_bit and not self.base_has_changed():
            with replaced_forward(base, self._four_bit_product):
                return peft_forward(x, *args, **kwargs)
        # peft's forward first, because a layer may quantize its weight at its first forward
        return additive.add_linear_noise(self, peft_forward(x, *args, **kwargs), x)

    def _four_bit_product(self, x: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        dtype = base.compute_dtype if base.compute_type_is_set and base.compute_dtype else x.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        backend = self.perturbation.settings.backend
        rows = FourBitRows(base)
        out = rebuilt_linear(x.to(dtype), rows, bias, *self.noise(), self.stream, backend=backend)
        return out.to(x.dtype)

    def _has_known_weight(self, base: nn.Module) -> bool:
        return True  # it is the package's
