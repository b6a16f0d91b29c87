"""Row norms of the merged weight, without the merged weight.

    W' = W + s B A            (several adapters: their ranks concatenated, each scaling folded into its B)
    ||W'_i||^2 = ||W_i||^2 + 2 s (W A^T)_i . B_i + s^2 B_i (A A^T) B_i^T

Only r x r, m x r and m-sized tensors are made. Flat-LoRA, arXiv 2409.14396, eq. 7 needs these norms at each new noise
sample; ||W_i||^2 belongs to the frozen weight and is computed once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import native
from .blocks import row_blocks


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms of a weight of this dtype are accumulated: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def squared_row_norms(weight: Tensor) -> Tensor:
    """``||W_i||^2`` of each row.

    Args:
        weight: (m, n) floating point, any strides.

    Returns:
        (m,) float32, or float64 for a float64 weight.
    """
    dtype = norm_dtype(weight.dtype)
    blocks = row_blocks(weight.shape[0], weight.shape[1], dtype.itemsize)
    return torch.cat([weight[rows].to(dtype).square().sum(dim=1) for rows in blocks])


def sums_merged_rows(weight: Tensor) -> bool:
    """Can `merged_row_norms` do without `squared` for this weight? The C kernel forms the merged rows themselves."""
    return native.has_norms(weight)


@torch.no_grad()
def merged_row_norms(
    weight: Tensor,  # (m, n)
    squared: Tensor | None,  # (m,)
    B: Tensor,  # (m, r)
    A: Tensor,  # (r, n)
    scaling: float = 1.0,
    whole: Tensor | None = None,  # (r, N)
) -> Tensor:
    """``||W_i + s (B A)_i||`` of each row, by the formula at the head of this module.

    Args:
        weight: (m, n).
        squared: (m,) from `squared_row_norms(weight)`; None for a weight that `sums_merged_rows`.
        B: (m, r).
        A: (r, n).
        scaling: s.
        whole: (r, N), the factor of which A is a part, if it is one (grouped convolutions); ``A A^T`` is then its own.

    Returns:
        (m,) float32, or float64 for a float64 weight.
    """
    if whole is None and sums_merged_rows(weight):
        return native.merged_row_norms(weight, B, A, scaling)
    assert squared is not None
    dtype = squared.dtype
    with no_autocast(weight.device.type):
        cross = (A.to(weight.dtype) @ weight.T).to(dtype)
        return row_norms_of_sum(squared, cross, B, A if whole is None else whole, scaling)


@torch.no_grad()
def row_norms_of_sum(
    squared: Tensor,  # (m,)
    cross: Tensor,  # (r, m)
    B: Tensor,  # (m, r)
    A: Tensor,  # (r, n)
    scaling: float = 1.0,
) -> Tensor:
    """`merged_row_norms` where ``A W^T`` is known and W need not be: squared and cross are float32 or float64."""
    dtype = squared.dtype
    with no_autocast(squared.device.type):
        Bt = (scaling * B.to(dtype)).T.contiguous()  # (r, m): r long rows are quicker to work on than m short ones
        A = A.to(dtype)
        low_rank = torch.addmm(cross, A @ A.T, Bt, beta=2).mul_(Bt).sum(dim=0)
    return low_rank.add_(squared).clamp_min_(0).sqrt_()  # rounding can leave a vanishing row just below zero


@torch.no_grad()
def grouped_row_norms(
    weight: Tensor,  # (m, n)
    squared: Tensor,  # (m,)
    B: list[Tensor],  # (m, r / groups) each
    A: list[Tensor],  # (r, groups n) each
    groups: int,
) -> Tensor:
    """Row norms of a grouped convolution's merged weight, of one or several adapters.

    W is zero outside of its group's input channels, but lora_A reads all of them: the output channels of group g see
    the g-th part of lora_A's rows over the whole input. So the cross term takes the group's columns of A, and the
    quadratic term all of them.

    Returns:
        (m,) of the dtype of `squared`.
    """
    norms, rows, columns = [], len(weight) // groups, weight.shape[1]
    for g in range(groups):
        here = slice(g * rows, (g + 1) * rows)
        part = torch.cat([a.to(squared.dtype).chunk(groups)[g] for a in A])  # (ranks / groups, all columns)
        inside = part[:, g * columns : (g + 1) * columns]
        b = torch.cat([b[here] for b in B], dim=1)
        norms.append(merged_row_norms(weight[here], squared[here], b, inside, whole=part))
    return torch.cat(norms)


def no_autocast(device: str) -> AbstractContextManager:
    """No autocast inside."""
    # it would round the products; where it is off already, the context would cost more than they do
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
