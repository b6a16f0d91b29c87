"""Merged weights W' = W + s B A of single layers, and their row norms ||W'_i||."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.dtypes import accumulation_dtype
from .displacement import CHUNK, Weight, active, find_weights
from .mean_loss import evaluation_mode
from .options import Layers


def merged_row_norms(model: nn.Module, layers: Layers = None, space: str = "merged") -> dict[str, Tensor]:
    """The row norms ||W'_i|| of each chosen weight, a common reference for the option `norms`.

    The layers are in evaluation mode meanwhile: the norms have no dropout, and no random state changes.

    Args:
        model: any module.
        layers, space: see `flatlora.analysis.options.Options`.

    Returns:
        (m,) for each layer, by name; float32, or float64 for a float64 weight.

    Raises:
        ValueError: no layer matched, or the norms of a layer are not available.
    """
    return all_row_norms(find_weights(model, layers, space))


def all_row_norms(weights: list[Weight]) -> dict[str, Tensor]:
    """The row norms of each weight by layer name, (m,) each; tied weights share those of the first."""
    first: dict[int, Tensor] = {}
    with evaluation_mode(nn.ModuleList(w.owner for w in weights)):  # some norms come from outputs, with dropout
        for w in weights:
            if w.index not in first:
                first[w.index] = row_norms(w)
    return {w.name: first[w.index] for w in weights}


@torch.no_grad()
def row_norms(weight: Weight) -> Tensor:
    """The norms of the rows of the layer's merged weight, (m,), float32, or float64 for a float64 weight.

    The merged weight is built for this layer only and freed. If the base weight is not available, the norms are the
    magnitudes of DoRA, or come from the layer's outputs for unit vectors, W' = (layer(I) - layer(0))^T.
    """
    values, owner = weight.values(), weight.owner
    dtype = accumulation_dtype(values.dtype)
    if weight.path is None:
        return _norms_from_outputs(weight, owner, dtype)
    if weight.path.startswith("base_layer."):
        values = merged_rows(weight, values, dtype)
    blocks = torch.split(values, max(1, CHUNK // values.shape[1]))
    return torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=dtype) for block in blocks])


def merged_rows(weight: Weight, values: Tensor, dtype: torch.dtype) -> Tensor:
    """W' in row form, (m, n), as a new tensor if the layer has active adapters.

    It is (m, groups n) for an adapted grouped convolution, whose adapter mixes the groups.
    """
    owner: Any = weight.owner
    adapters = active(owner)
    if weight.path is None or not adapters:
        return values
    groups = getattr(owner.get_base_layer(), "groups", 1)
    if groups > 1:
        values = _ungrouped(values.reshape(len(values), *weight.full_shape[1:]), groups).flatten(1)
    for adapter in adapters:
        delta = _grouped_delta(owner, adapter, groups) if groups > 1 else owner.get_delta_weight(adapter)
        values = values.to(dtype) + (delta.T if weight.transposed else delta.flatten(1)).to(dtype)
    return values


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The weight of a grouped convolution over all input channels, zero outside of its group."""
    m, n, *kernel = weight.shape
    full = weight.new_zeros(groups, m // groups, groups, n, *kernel)
    for g, rows in enumerate(weight.chunk(groups)):
        full[g, :, g] = rows
    return full.view(m, groups * n, *kernel)


def _grouped_delta(owner: Any, adapter: str, groups: int) -> Tensor:
    """The update of a grouped convolution: peft groups the convolution with B, and that with A reads all channels."""
    A, B = owner.lora_A[adapter].weight, owner.lora_B[adapter].weight
    parts = [b.flatten(1) @ a.flatten(1) for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)]
    scaling: float = owner.scaling[adapter]
    return scaling * torch.cat(parts)


def _norms_from_outputs(weight: Weight, owner: Any, dtype: torch.dtype) -> Tensor:
    """The row norms of a weight that is not available: from magnitudes, or from outputs of the layer."""
    base = owner.get_base_layer()
    if isinstance(base, nn.Embedding):
        rows = torch.split(torch.arange(weight.shape[0], device=base.weight.device), max(1, CHUNK // weight.shape[1]))
        scale = float(getattr(base, "embed_scale", 1))
        return torch.cat([torch.linalg.vector_norm(owner(r), dim=1, dtype=dtype) for r in rows]) / scale
    dora = [name for name in active(owner) if getattr(owner, "use_dora", {}).get(name)]
    if dora:
        magnitudes: Tensor = owner.lora_magnitude_vector[dora[-1]].weight
        return magnitudes.flatten().abs().to(dtype)
    outputs = _outputs_for_unit_vectors(owner, weight.shape[1], weight.values())
    return sum((y.to(dtype).square().sum(dim=0) for y in outputs), torch.zeros((), dtype=dtype)).sqrt()


def _outputs_for_unit_vectors(owner: nn.Module, n: int, like: Tensor) -> Iterator[Tensor]:
    """Blocks of columns of W', (columns, m) each."""
    zero = owner(torch.zeros(1, n, dtype=like.dtype, device=like.device))
    step = max(1, CHUNK // n)
    for start in range(0, n, step):
        units = torch.zeros(min(step, n - start), n, dtype=like.dtype, device=like.device)
        units[:, start:].fill_diagonal_(1)
        yield owner(units) - zero
