"""Row norms ||W'_i|| of the weight a layer acts with, its adapters included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .weights import CHUNK, Weight, active


def all_row_norms(weights: list[Weight]) -> dict[str, Tensor]:
    """The row norms of every chosen weight by layer name, each (m,); tied weights share those of the first."""
    first: dict[int, Tensor] = {}
    return {w.name: first[w.index] if w.index in first else first.setdefault(w.index, row_norms(w)) for w in weights}


@torch.no_grad()
def row_norms(weight: Weight) -> Tensor:
    """The norms of the rows of the weight the layer acts with, (m,), float32 or the weight's float64.

    The merged weight is built for this one layer and dropped. Where the base weight is out of reach, the norms are
    DoRA's magnitudes, or read off the layer's answers to unit vectors, W' = (layer(I) - layer(0))^T.
    """
    values, owner = weight.values(), weight.owner
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    if weight.path is None:
        return _norms_by_answers(weight, owner, dtype)
    if weight.path.startswith("base_layer."):
        values = merged_rows(weight, values, dtype)
    blocks = values.split(max(1, CHUNK // values.shape[1]))
    return torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=dtype) for block in blocks])


def merged_rows(weight: Weight, values: Tensor, dtype: torch.dtype) -> Tensor:
    """W' in row form, (m, n), made for this call; (m, groups n) for an adapted grouped convolution, whose adapter
    mixes the groups."""
    owner: Any = weight.owner
    adapters = active(owner)
    if weight.path is None or not adapters:
        return values
    groups = getattr(owner.get_base_layer(), "groups", 1)
    if groups > 1:
        values = _ungrouped(values.unflatten(1, weight.full_shape[1:]), groups).flatten(1)
    for adapter in adapters:
        delta = _grouped_delta(owner, adapter, groups) if groups > 1 else owner.get_delta_weight(adapter)
        values = values.to(dtype) + (delta.T if weight.transposed else delta.flatten(1)).to(dtype)
    return values


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """A grouped convolution's weight written out over all input channels, zero outside its group."""
    m, n, *kernel = weight.shape
    full = weight.new_zeros(groups, m // groups, groups, n, *kernel)
    for g, rows in enumerate(weight.chunk(groups)):
        full[g, :, g] = rows
    return full.view(m, groups * n, *kernel)


def _grouped_delta(owner: Any, adapter: str, groups: int) -> Tensor:
    """peft groups B's convolution and not A's: the rows of a group see their own ranks, and all input channels."""
    A, B = owner.lora_A[adapter].weight, owner.lora_B[adapter].weight
    parts = [b.flatten(1) @ a.flatten(1) for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)]
    return owner.scaling[adapter] * torch.cat(parts)


def _norms_by_answers(weight: Weight, owner: Any, dtype: torch.dtype) -> Tensor:
    base = owner.get_base_layer()
    if isinstance(base, nn.Embedding):
        rows = torch.arange(weight.shape[0], device=base.weight.device).split(max(1, CHUNK // weight.shape[1]))
        scale = float(getattr(base, "embed_scale", 1))
        return torch.cat([torch.linalg.vector_norm(owner(r), dim=1, dtype=dtype) for r in rows]) / scale
    dora = [name for name in active(owner) if getattr(owner, "use_dora", {}).get(name)]
    if dora:
        return owner.lora_magnitude_vector[dora[-1]].weight.flatten().abs().to(dtype)
    like = weight.values()
    answers = _answers_to_units(owner, weight.shape[1], like)
    return sum((a.to(dtype).square().sum(dim=0) for a in answers), torch.zeros((), dtype=dtype)).sqrt()


def _answers_to_units(owner: nn.Module, n: int, like: Tensor) -> Iterator[Tensor]:
    """Columns of W', some at a time, each block (columns, m)."""
    zero = owner(torch.zeros(1, n, dtype=like.dtype, device=like.device))
    step = max(1, CHUNK // n)
    for start in range(0, n, step):
        units = torch.zeros(min(step, n - start), n, dtype=like.dtype, device=like.device)
        units[:, start:].fill_diagonal_(1)
        yield owner(units) - zero
