"""The row norms ``||W'_i||`` of a layer's merged weight, and their cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ops import merged_row_norms, squared_row_norms, sums_merged_rows
from ..ops.blocks import unwatched
from ..ops.norms import grouped_row_norms, norm_dtype
from .module_weights import is_gathered
from .quantized_rows import quantized_row_norms, squared_norms
from .weights import rows_of

if TYPE_CHECKING:
    from .flat_layer import FlatLayer

ANY_PASS = object()  # the token of norms that do not depend on the pass


class Source(NamedTuple):
    """What norms are computed from: they are reused for the same tensors, unchanged, in the same pass.

    A write through `.data` changes no version counter, so merged norms are not kept from one pass to the next.
    """

    token: object | None  # identifies the pass; None if it is not known
    tensors: list[Tensor]
    state: tuple[Any, ...]  # versions, addresses and scales

    def same_as(self, other: Source | None) -> bool:
        """Whether norms of the source `other`, as `NormCache` keeps it, can be reused."""
        if other is None or self.token is None or other.token is not self.token or other.state != self.state:
            return False
        kept: list[Any] = other.tensors
        return len(kept) == len(self.tensors) and all(ref() is t for ref, t in zip(kept, self.tensors, strict=True))


class NormCache(dict[str, Any]):
    """Norms by name, each as (source, norms). Tensors are held weakly, because an address may be reused."""

    def find(self, name: str, source: Source) -> Tensor | None:
        known = self.get(name)
        if known is None or not source.same_as(known[0]):
            return None
        norms: Tensor = known[1]
        return norms

    def keep(self, name: str, source: Source, norms: Tensor) -> None:
        references: Any = [weakref.ref(tensor) for tensor in source.tensors]
        self[name] = source._replace(tensors=references), norms

    def get_or_compute(self, name: str, source: Source, compute: Callable[[], Tensor]) -> Tensor:
        norms = self.find(name, source)
        if norms is None:
            with unwatched():
                norms = compute()
            self.keep(name, source, norms)
        return norms


def merged_source(layer: FlatLayer, adapters: list[str], tensors: list[Tensor]) -> Source:
    """The source of the merged norms of these adapters."""
    scales = [float(layer.scaling[name]) for name in adapters]  # tensors if peft prepares a hot swap
    versions = [(t._version, t.data_ptr()) for t in tensors]
    # autograd refuses tensors that were created in inference mode
    state = (torch.is_inference_mode_enabled(), *adapters, *scales, *versions)
    return Source(layer.perturbation.records.token(), tensors, state)


def row_norms(layer: FlatLayer) -> Tensor:
    """``||W'_i||`` of the merged weight, (m,); with DoRA the absolute value of the magnitude vector."""
    adapters = layer.active_lora_adapters()
    # which tensors exist differs between processes, which must agree on whether to gather
    gathered = any(is_gathered(A) for name, A in layer.lora_A.items() if name in adapters)
    source = merged_source(layer, adapters, [] if gathered else layer.weights.tensors(adapters))
    return layer._norms.get_or_compute("merged", source, lambda: compute_row_norms(layer))


@torch.no_grad()
def compute_row_norms(layer: FlatLayer) -> Tensor:
    """`row_norms` without the cache."""
    weights = layer.weights
    magnitudes = weights.magnitudes()
    if magnitudes is None:
        return norms_before_dora(layer)
    return magnitudes.to(norm_dtype(weights.base.weight.dtype) if weights.is_dense() else torch.float32)


@torch.no_grad()
def norms_before_dora(layer: FlatLayer) -> Tensor:
    """``||W_i + s (B A)_i||``, (m,), which DoRA replaces by its magnitudes."""
    weights, adapters = layer.weights, layer.active_lora_adapters()
    if not weights.is_dense():
        return _of_quantized(layer, adapters)
    base = weights.base
    A, B = map(list, zip(*(weights.factors(name) for name in adapters), strict=True))
    return norms_of_sum(layer, [base.weight], rows_of(base), A, B, getattr(base, "groups", 1))


def norms_of_sum(
    layer: FlatLayer, stored: list[Tensor], weight: Tensor, A: list[Tensor], B: list[Tensor], groups: int = 1
) -> Tensor:
    """``||W_i + sum_k s_k (B_k A_k)_i||`` over the active adapters, (m,).

    Args:
        layer: keeps ``||W_i||^2``, and has the scales.
        stored: the tensors that W is computed from.
        weight: W, (m, n).
        A, B: the factors of each adapter, (r, n) and (m, r).
        groups: of a convolution.
    """
    squared: Any = None
    if groups > 1 or not sums_merged_rows(weight):
        squared = _of_base(layer, stored, lambda: squared_row_norms(weight))
    scales = [float(layer.scaling[name]) for name in layer.active_lora_adapters()]
    if groups == 1 and len(scales) == 1:
        return merged_row_norms(weight, squared, B[0], A[0], scales[0])
    dtype = norm_dtype(weight.dtype)
    B = [b.to(dtype) * scale for b, scale in zip(B, scales, strict=True)]
    if groups > 1:
        return grouped_row_norms(weight, squared, B, A, groups)
    return merged_row_norms(weight, squared, torch.cat(B, dim=1), torch.cat(A))


def _of_quantized(layer: FlatLayer, adapters: list[str]) -> Tensor:
    """Row norms over a weight that is stored in another form. The factors of all adapters are concatenated."""
    base = layer.weights.base
    input_dtype = layer.__dict__.get("input_dtype", torch.float32)
    stored = [*base.parameters(), *base.buffers()]
    squared = _of_base(layer, stored, lambda: squared_norms(base, layer.in_features, input_dtype))
    A, B = zip(*(layer.weights.factors(name) for name in adapters), strict=True)
    scales = [float(layer.scaling[name]) for name in adapters]
    scaled = torch.cat([b.float() * scale for b, scale in zip(B, scales, strict=True)], dim=1)
    return quantized_row_norms(base, squared, scaled, torch.cat([a.float() for a in A]), input_dtype)


def _of_base(layer: FlatLayer, stored: list[Tensor], compute: Callable[[], Tensor]) -> Tensor:
    """``||W_i||^2``, computed once for these tensors."""
    kinds = [(t._version, t.data_ptr(), t.dtype, t.device) for t in stored]
    source = Source(ANY_PASS, stored, (torch.is_inference_mode_enabled(), kinds))
    return layer._norms.get_or_compute("base", source, compute)
