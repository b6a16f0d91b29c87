"""Layers whose frozen weight is quantised.

| base layer                    | how eps enters                                                                    |
|-------------------------------|-----------------------------------------------------------------------------------|
| bitsandbytes, 4 bits          | its forward is x W^T with W dequantised: computed once, with W + eps              |
| the same with DoRA            | x eps^T is added, see `layer.py`                                                  |
| all others                    | x eps^T is added. Some quantise x as well (8 bits), some have kernels of their    |
|                               | own: the base product stays theirs, bit for bit                                   |

W is dequantised for the length of a product, a block of rows at a time where the format allows it, and again in
backward; ||W_i||^2 is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layer import FlatLayer
from .ops import perturbed_linear, rebuilt_linear
from .spread import replaced_forward
from .weights import FourBitRows


class QuantisedLayer(FlatLayer):
    """A flat layer over a quantised linear layer."""

    def with_noise(self, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base, backend = self.get_base_layer(), self.perturbation.settings.backend
        self._norms["takes"] = (x.dtype,)
        if self._is_four_bit_product(base):
            with replaced_forward(base, self._four_bit_product):
                return plain(x, *args, **kwargs)
        out = plain(x, *args, **kwargs)  # first: a layer may quantise its weight at its first forward
        none = torch.zeros(1, dtype=x.dtype, device=x.device).expand(
            self.out_features, self.in_features
        )  # W = 0 without its memory: eps alone
        return out + perturbed_linear(x, none, None, *self.noise(), self.stream, backend=backend).to(out.dtype)

    def _is_four_bit_product(self, base: Any) -> bool:
        four_bit = self.plain_class.__name__ == "Linear4bit" and self._magnitudes() is None
        return four_bit and not self._base_has_changed(base)

    def _four_bit_product(self, x: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        dtype = base.compute_dtype if base.compute_type_is_set and base.compute_dtype else x.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        settings: Any = {"backend": self.perturbation.settings.backend}
        out = rebuilt_linear(x.to(dtype), FourBitRows(base), bias, *self.noise(), self.stream, **settings)
        return out.to(x.dtype)

    def _one_adapter(self) -> None:
        return None

    def anchor(self) -> Any:
        base = self.get_base_layer()
        return base._parameters.get("weight", base)

    def _device(self) -> torch.device:
        return self._factors(self._active())[-1].device

    def _columns(self) -> int:
        return self.in_features

    def _factors(self, active: list[str]) -> list[Tensor]:
        factors = (self.lora_magnitude_vector, self.lora_A, self.lora_B)
        return [factor[name].weight for name in active for factor in factors if name in factor]

    @torch.no_grad()
    def _merged_row_norms(self) -> Tensor:
        magnitudes = self._magnitudes()
        return self._row_norms_of_quantized(self.get_base_layer()) if magnitudes is None else magnitudes.float()

    def _is_base_weight_ours(self, base: Any) -> bool:
        return True  # it is the package's
