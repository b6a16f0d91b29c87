"""W, A and B of one layer: rows, factors, and what identifies them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora.variants import BlockDiagonalLinear, QALoraLinearVariant
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .module_weights import whole_weight
from .supported import is_torch_tensor

if TYPE_CHECKING:
    from .flat_layer import FlatLayer


def rows_of(base: Any) -> Tensor:
    """A weight as a matrix with one output per row: Conv1D stores (in, out), and a filter is flattened."""
    weight: Tensor = base.weight.T if isinstance(base, Conv1D) else base.weight.flatten(1)
    return weight


class LayerWeights:
    """The frozen weight W, (m, n), and the factors A, (r, n), and B, (m, r), of one layer."""

    __slots__ = ("base", "layer")

    def __init__(self, layer: FlatLayer) -> None:
        self.layer = layer
        self.base: Any = layer.get_base_layer()

    @property
    def anchor(self) -> Any:
        """The object that identifies W: layers that share it share their noise."""
        return self.base.weight

    @property
    def device(self) -> torch.device:
        device: torch.device = self.base.weight.device
        return device

    @property
    def columns(self) -> int:
        """n; for a convolution the number of weights of a filter."""
        layer = self.layer
        columns: int = self.base.weight.numel() // layer.out_features if self.is_dense() else layer.in_features
        return columns

    def is_dense(self) -> bool:
        """Whether W is a tensor of floating-point numbers, and not quantized."""
        return is_torch_tensor(self.base.weight) and self.base.weight.is_floating_point()

    def tensors(self, adapters: list[str]) -> list[Any]:
        """The tensors from which the merged weight of these adapters is computed."""
        layer = self.layer
        factors = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        found = [factor[name] for name in adapters for factor in factors if name in factor]
        singular = getattr(layer, "lora_diag", getattr(layer, "lora_E", {}))  # of KaSA and AdaLoRA
        values = [value for name, value in singular.items() if name in adapters]
        return [self.base.weight, *values, *(f if isinstance(f, Tensor) else f.weight for f in found)]

    def magnitudes(self) -> Tensor | None:
        """With DoRA, the norms of the merged rows: the magnitudes of the last adapter. Else None."""
        layer = self.layer
        dora = [name for name in layer.active_lora_adapters() if layer.use_dora.get(name)]
        return whole_weight(layer.lora_magnitude_vector[dora[-1]]).detach().flatten().abs() if dora else None

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A, (r, n), and B, (m, r), whose product this adapter adds, without its scaling."""
        layer: Any = self.layer  # of one of peft's subclasses
        is_adalora = isinstance(layer, AdaLoraLayer)
        if is_adalora:
            singular = layer.lora_E[adapter] / (layer.ranknum[adapter] + 1e-5)  # as peft divides
            return layer.lora_A[adapter].detach() * singular.detach(), layer.lora_B[adapter].detach()
        A, B = (_dense(factor[adapter]) for factor in (layer.lora_A, layer.lora_B))
        if isinstance(layer.lora_variant.get(adapter), QALoraLinearVariant):
            # x is averaged over groups, and multiplied by their number
            size = layer.qalora_group_size[adapter]
            A = A.repeat_interleave(size, dim=1) * (A.shape[1] / size)
        diagonal = getattr(layer, "lora_diag", {})  # KaSA's singular values
        return (A * diagonal[adapter].detach()[:, None] if adapter in diagonal else A), B


def _dense(factor: Any) -> Tensor:
    is_block_diagonal = isinstance(factor, BlockDiagonalLinear)
    weight: Any = factor.weight_as_blockdiagonal_matrix() if is_block_diagonal else whole_weight(factor)
    dense: Tensor = weight.detach().flatten(1)
    return dense
