"""Merge and unmerge adapters exactly: after `unmerge` the frozen weight has the bits that it had before `merge`.

peft merges by W' = round(W + sBA) and unmerges by round(W' - sBA), which differs from W in many elements. So trainers
that merge around each generation (TRL's GRPO with vLLM) would move W in each round. For the length of the merge this
module keeps the difference of the bits, one byte per weight. Elements whose difference does not fit into a byte are
kept themselves. With a variant such as DoRA it keeps a copy of W, because peft unmerges with the norms of the merged
weight.

Attention, expert parameters and quantized weights are merged and unmerged as by peft.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.blocks import row_blocks
from ..training.distributed import is_sharded
from .module_weights import attributes

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
    unmerged: str  # fingerprint of what peft's `unmerge` gives


# by frozen weight: the layers that are merged into it and have something kept, in the order of merging
_merged: MutableMapping[Tensor, list[weakref.ref[FlatLayer]]] = WeakTensorKeyDictionary()


def difference(weight: Tensor, unmerged: Tensor) -> Difference:
    """The difference of two weights of one shape and dtype."""
    bits = _BITS[weight.dtype.itemsize]
    # integers wrap around, so adding the difference is exact whatever the signs are
    steps = weight.view(bits) - unmerged.view(bits)
    outside = (steps > 127) | (steps < -128)
    places = outside.flatten().nonzero().flatten()
    return Difference(steps.masked_fill_(outside, 0).to(torch.int8), places, weight.flatten()[places])


def restore_(unmerged: Tensor, kept: Difference | Tensor) -> None:
    """Turn the unmerged weight into W, in place."""
    if isinstance(kept, Tensor):
        unmerged.copy_(kept)
        return
    bits = unmerged.view(_BITS[unmerged.dtype.itemsize])
    bits.add_(kept.steps)
    unmerged.view(-1)[kept.places] = kept.values


@contextmanager
def recorded(layer: FlatLayer) -> Iterator[None]:
    """Inside, peft merges adapters of a layer; what `restored` needs is kept on the layer."""
    base: Any = layer.get_base_layer()
    if layer.perturbation.rho == 0 or not _is_whole(layer, base) or not base.weight.is_contiguous():
        yield
        return
    with _alone(layer, base):
        before = list(layer.merged_adapters)
        original = _original(layer, base)
        yield
        if list(layer.merged_adapters) == before:
            return
        _forget(layer, base)
        if original is not None:
            weight, bias = original
            unmerged, fingerprint = _dry_unmerge(layer, base)
            kept = weight if layer.lora_variant else difference(weight, unmerged)
            layer.__dict__["_kept"] = Kept(kept, bias, fingerprint)
            _merged.setdefault(base.weight, []).append(weakref.ref(layer))


@contextmanager
def restored(layer: FlatLayer) -> Iterator[None]:
    """Inside, peft unmerges the adapters of a layer; then W gets its bits back, unless it has been changed since."""
    base: Any = layer.get_base_layer()
    kept: Kept | None = layer.__dict__.get("_kept")
    if kept is None:
        yield
        return
    with _alone(layer, base):
        _forget(layer, base)
        was_merged = bool(layer.merged_adapters)
        yield
        if was_merged and _fingerprint(layer, base) == kept.unmerged:
            restore_(base.weight.data, kept.weight)
            if kept.bias is not None:
                base.bias.data.copy_(kept.bias)


@contextmanager
def _alone(layer: FlatLayer, base: Any) -> Iterator[None]:
    """Inside, the layers that were merged into the same weight after this one are unmerged."""
    layers: list[Any] = [ref() for ref in _merged.get(base.weight, [])]
    above = layers[layers.index(layer) + 1 :] if layer in layers and layer.merged_adapters else []
    lifted: list[tuple[Any, list[str]]] = []
    try:
        for one in reversed(above):
            # not if it is gone or plain again, or merged for good by clearing the list
            if "_kept" in getattr(one, "__dict__", ()) and one.merged_adapters:
                lifted.append((one, list(one.merged_adapters)))
                one.unmerge()
        yield
    finally:
        for one, names in reversed(lifted):
            one.merge(adapter_names=names)


def _forget(layer: FlatLayer, base: Any) -> None:
    """Drop what is kept of a layer."""
    layer.__dict__.pop("_kept", None)
    layers = _merged.get(base.weight, [])
    layers[:] = [ref for ref in layers if ref() not in (layer, None)]


def _is_whole(layer: FlatLayer, base: Any) -> bool:
    """Whether this process has all bits of the weight."""
    weight = base._parameters.get("weight")
    if not isinstance(weight, nn.Parameter) or not layer.weights.is_dense():
        return False
    has_bits = weight.is_floating_point() and weight.dtype.itemsize in _BITS
    return has_bits and not weight.is_meta and not is_sharded(weight)


def _original(layer: FlatLayer, base: Any) -> tuple[Tensor, Tensor | None] | None:
    """Copies of W and of the bias, also if adapters are merged already; None if that is not known."""
    changes_bias = any(layer.lora_bias.values()) and base.bias is not None
    bias = base.bias.detach().clone() if changes_bias else None
    if not layer.merged_adapters:
        return base.weight.detach().clone(), bias
    kept: Kept | None = layer.__dict__.get("_kept")
    if kept is None:
        return None
    unmerged, fingerprint = _dry_unmerge(layer, base)
    if fingerprint != kept.unmerged:
        return None
    restore_(unmerged, kept.weight)
    return unmerged, bias if kept.bias is None else kept.bias


def _dry_unmerge(layer: FlatLayer, base: Any) -> tuple[Tensor, str]:
    """The weight that peft's `unmerge` would give, and its fingerprint; the layer stays merged."""
    peft_class: Any = layer.peft_class
    merged, bias, names = base.weight.data, None, list(layer.merged_adapters)
    if getattr(base, "bias", None) is not None:
        bias = base.bias.data.clone()
    base.weight.data = merged.clone()
    # DoRA's norms are taken out of the cache
    caches = dict(layer.__dict__.get("_caches", {}))
    try:
        with attributes(layer, _caches=caches):
            peft_class.unmerge(layer)
        return base.weight.data, _fingerprint(layer, base)
    finally:
        base.weight.data = merged
        layer.merged_adapters[:] = names
        if bias is not None:
            base.bias.data.copy_(bias)


def _fingerprint(layer: FlatLayer, base: Any) -> str:
    """A digest of the bits of the weight, and of the bias if adapters change it; "" if the weight is not whole."""
    if not _is_whole(layer, base):
        return ""
    digest = hashlib.sha256()
    for tensor in (base.weight, base.bias if any(layer.lora_bias.values()) else None):
        if tensor is not None:
            digest.update(f"{tensor.dtype} {tensor.device}".encode())
            bits = tensor.detach().view(_BITS[tensor.dtype.itemsize])
            for sums in _sums(bits.flatten(1) if bits.ndim > 1 else bits[None]):
                digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(bits: Tensor) -> Iterator[Tensor]:
    """The sums over each row and each column, modulo 2^64."""
    m, n = bits.shape
    columns = torch.zeros(n, dtype=torch.int64, device=bits.device)
    for rows in row_blocks(m, n, itemsize=8):
        block = bits[rows].long()
        columns += block.sum(0)
        yield block.sum(1)
    yield columns
