"""Merge and unmerge adapters exactly: after `unmerge` the frozen weight has the bits that it had before `merge`.

peft merges by W' = round(W + sBA) and unmerges by round(W' - sBA), which differs from W in many elements. So trainers
that merge around each generation (TRL's GRPO with vLLM) would move W in each round. For the length of the merge this
module keeps the difference of the bits, one byte per weight. Elements whose difference does not fit into a byte are
kept themselves. With a variant such as DoRA it keeps a copy of W, because peft unmerges with the norms of the merged
weight.

Attention, expert parameters and quantized weights are merged and unmerged as by peft.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..training.distributed import is_sharded

if TYPE_CHECKING:
    from .flat_layer import FlatLayer

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


class Difference(NamedTuple):
    """What turns the unmerged weight into W, bit for bit."""

    steps: (
        Tensor  # int8, shape of W: bits of W minus bits of the unmerged weight, modulo 2^bits; 0 if it is not in a byte
    )
    places: Tensor  # int64, (k,): flat indices of the elements whose difference is not in a byte
    values: Tensor  # (k,): W there


class Kept(NamedTuple):
    """What is kept of a layer while its adapters are merged."""

    weight: Difference | Tensor  # a tensor is W itself
    bias: Tensor | None
    source: tuple[Any, ...]  # see `_source`


def difference(weight: Tensor, unmerged: Tensor) -> Difference:
    """The difference of two weights of one shape and dtype."""
    bits = _BITS[weight.dtype.itemsize]
    # integers wrap around, so adding the difference is exact whatever the signs are
    steps = weight.view(bits) - unmerged.view(bits)
    outside = (steps > 127) | (steps < -128)
    places = outside.flatten().nonzero().flatten()
    return Difference(steps.masked_fill_(outside, 0).to(torch.int8), places, weight.flatten()[places])


def restore_(unmerged: Tensor, kept: Difference) -> None:
    """Turn the unmerged weight into W, in place."""
    bits = unmerged.view(_BITS[unmerged.dtype.itemsize])
    bits.add_(kept.steps)
    unmerged.view(-1)[kept.places] = kept.values


@contextmanager
def recorded(layer: FlatLayer) -> Iterator[None]:
    """Inside, peft merges adapters of a layer; what `unmerge` needs is kept on the layer."""
    base: Any = layer.get_base_layer()
    if not _can_restore(layer, base):
        yield
        return
    before = list(layer.merged_adapters)
    weight, bias = _original(layer, base)
    yield
    if list(layer.merged_adapters) == before:
        return
    kept = weight if layer.lora_variant else difference(weight, _dry_unmerge(layer, base))
    layer.__dict__["_kept"] = Kept(kept, bias, _source(layer, base))


def take(layer: FlatLayer) -> Kept | None:
    """What was kept, before peft unmerges; None if the weight or the factors have been changed since the merge."""
    kept: Kept | None = layer.__dict__.pop("_kept", None)
    return kept if kept is not None and kept.source == _source(layer, layer.get_base_layer()) else None


def restore(layer: FlatLayer, kept: Kept) -> None:
    """Restore the bits of W, after peft has unmerged the adapters."""
    base: Any = layer.get_base_layer()
    if isinstance(kept.weight, Difference):
        restore_(base.weight.data, kept.weight)
    else:
        base.weight.data.copy_(kept.weight)
    if kept.bias is not None:
        base.bias.data.copy_(kept.bias)


def _can_restore(layer: FlatLayer, base: Any) -> bool:
    weight = base._parameters.get("weight")
    if layer.perturbation.rho == 0 or not isinstance(weight, nn.Parameter) or not layer.weights.is_dense():
        return False
    return weight.is_floating_point() and weight.is_contiguous() and not weight.is_meta and not is_sharded(weight)


def _original(layer: FlatLayer, base: Any) -> tuple[Tensor, Tensor | None]:
    """Copies of W and of the bias, also if adapters are merged already."""
    kept: Kept | None = layer.__dict__.get("_kept")
    changes_bias = any(layer.lora_bias.values()) and base.bias is not None
    bias = base.bias.detach().clone() if changes_bias else None
    if kept is None:
        return base.weight.detach().clone(), bias
    if isinstance(kept.weight, Tensor):
        return kept.weight, kept.bias
    weight = _dry_unmerge(layer, base)
    restore_(weight, kept.weight)
    return weight, kept.bias


def _dry_unmerge(layer: FlatLayer, base: Any) -> Tensor:
    """The weight that peft's `unmerge` would give; the layer stays merged."""
    peft_class: Any = layer.peft_class
    merged, bias, names = base.weight.data, None, list(layer.merged_adapters)
    if getattr(base, "bias", None) is not None:
        bias = base.bias.data.clone()
    base.weight.data = merged.clone()
    try:
        if names:
            peft_class.unmerge(layer)
        unmerged: Tensor = base.weight.data
    finally:
        base.weight.data = merged
        layer.merged_adapters[:] = names
        if bias is not None:
            base.bias.data.copy_(bias)
    return unmerged


def _source(layer: FlatLayer, base: Any) -> tuple[Any, ...]:
    """What peft unmerges from: versions of the weight and the factors, and scales."""
    tensors = [base.weight, *(p for name, p in layer.named_parameters() if "lora_" in name)]
    return *((p._version, p.data_ptr()) for p in tensors), *(float(scale) for scale in layer.scaling.values())
