"""Row norms of the merged weight, without the merged weight.

    W' = W + s B A            (several adapters: their ranks concatenated, each scaling folded into its B)
    ||W'_i||^2 = ||W_i||^2 + 2 s (W A^T)_i . B_i + s^2 B_i (A A^T) B_i^T

Only r x r, m x r and m-sized tensors are made. Flat-LoRA, arXiv 2409.14396, eq. 7 needs these norms at each new noise
sample; ||W_i||^2 belongs to the frozen weight and is computed once.

Sums of squares are made in float32, and again in float64 where a row leaves the range in which float32 holds them to
its full precision: a root mean square of the row between 4e-16 and 1.8e19 / sqrt(n). Ordinary rows never do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import native
from .blocks import row_blocks
from .operands import expect, expect_factors, matrix, number

SMALLEST = 2.0**-102  # the smallest normal float32, over 2^-24: a mean square from here on loses nothing to underflow
WIDE = frozenset({torch.float32, torch.float64})
LARGEST = torch.finfo(torch.float32).max


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms of a weight of this dtype are accumulated: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _in_range(squared: Tensor, columns: int) -> bool:
    """Have all of these float32 sums of `columns` squares kept their precision? Waits for a GPU."""
    if squared.numel() == 0:
        return True
    low, high = squared.aminmax()
    return float(low) >= columns * SMALLEST and float(high) <= LARGEST  # nan is in no range


@torch.no_grad()
def squared_row_norms(weight: Tensor) -> Tensor:
    """``||W_i||^2`` of each row. It waits for a GPU, so ask for it once for each frozen weight.

    Args:
        weight: (m, n) floating point, any strides; or anything that gives blocks of rows, such as `merged.Rows`.

    Returns:
        (m,) float32; float64 for a float64 weight, and where the square of a row leaves the range of float32.
    """
    m, n = matrix("weight", weight)
    dtype = norm_dtype(weight.dtype)
    blocks = list(row_blocks(m, n, dtype.itemsize))
    if not blocks:
        return torch.zeros(0, dtype=dtype, device=getattr(weight, "device", None) or "cpu")
    squared = torch.cat([weight[rows].to(dtype).square().sum(dim=1) for rows in blocks])
    if dtype == torch.float64 or _is_captured(squared) or _in_range(squared, n):
        return squared
    wide = squared.double()
    for rows in blocks:
        (again,) = torch.where(~_keeps_precision(squared[rows], n))
        if len(again) > 0:
            wide[rows.start + again] = weight[rows][again].double().square().sum(dim=1)
    return squared if torch.equal(wide, squared.double()) else wide  # equal: rows of zeros


def _keeps_precision(squared: Tensor, columns: int) -> Tensor:
    return (squared >= columns * SMALLEST) & (squared <= LARGEST)


def _is_captured(tensor: Tensor) -> bool:
    """Is a CUDA graph recorded, in which nothing can be waited for?"""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def row_norms(weight: Tensor) -> Tensor:
    """``||W_i||`` of each row, the square root of `squared_row_norms`, without waiting for a GPU.

    Args:
        weight: (m, n) floating point, any strides.

    Returns:
        (m,) float32, or float64 for a float64 weight.
    """
    m, n = matrix("weight", weight)
    dtype = norm_dtype(weight.dtype)
    norms = torch.empty(m, dtype=dtype, device=weight.device)
    for rows in row_blocks(m, n, dtype.itemsize):
        block = weight[rows].to(dtype)
        squared = block.square().sum(dim=1)
        norms[rows] = squared.sqrt()
        if dtype == torch.float64 or (block.is_cpu and _in_range(squared, n)):
            continue
        wide = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).float()
        norms[rows] = torch.where(_keeps_precision(squared, n), norms[rows], wide)
    return norms


def sums_merged_rows(weight: Tensor) -> bool:
    """Can `merged_row_norms` do without `squared` for this weight? The C kernel forms the merged rows themselves."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor of shape (m, n), got {type(weight).__name__}")
    return weight.ndim == 2 and native.has_norms(weight)


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

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    m, n = matrix("weight", weight)
    scaling = number("scaling", scaling)
    if squared is not None:
        expect("squared", squared, (m,), WIDE, None)
    if whole is not None and matrix("whole", whole)[0] != len(A):
        raise ValueError(f"whole must be of shape ({len(A)}, N), got {tuple(whole.shape)}")
    if whole is None and sums_merged_rows(weight):
        return native.merged_row_norms(weight, B, A, scaling)
    expect_factors(B, A, m, n, weight.device)
    if squared is None:
        raise ValueError("squared must be squared_row_norms(weight) for a weight that not sums_merged_rows, got None")
    dtype, wide = norm_dtype(weight.dtype), None
    with no_autocast(weight.device.type):
        cross = (A.to(weight.dtype) @ weight.T).to(dtype)
        if squared.dtype != dtype:
            blocks = row_blocks(m, n, torch.float64.itemsize)
            wide = torch.cat([A.double() @ weight[rows].double().T for rows in blocks], dim=1)
        return _norms_of_sum(squared, cross, B, A if whole is None else whole, scaling, wide)


@torch.no_grad()
def row_norms_of_sum(
    squared: Tensor,  # (m,)
    cross: Tensor,  # (r, m)
    B: Tensor,  # (m, r)
    A: Tensor,  # (r, n)
    scaling: float = 1.0,
) -> Tensor:
    """`merged_row_norms` where ``A W^T`` is known and W need not be.

    Args:
        squared, cross: float32 or float64. Where `squared` alone is float64, it is of a weight of float32 that leaves
            its range.

    Returns:
        (m,) of the dtype of `cross`.
    """
    m = squared.numel() if isinstance(squared, Tensor) else 0
    expect("squared", squared, (m,), WIDE, None)
    n = matrix("A", A)[1]
    expect_factors(B, A, m, n, squared.device)
    expect("cross", cross, (A.shape[0], m), WIDE, squared.device)
    with no_autocast(squared.device.type):
        return _norms_of_sum(squared, cross, B, A, number("scaling", scaling))


def _norms_of_sum(
    squared: Tensor, cross: Tensor, B: Tensor, A: Tensor, scaling: float, wide_cross: Tensor | None = None
) -> Tensor:
    dtype, n = cross.dtype, A.shape[1]
    total = _squared_sum(squared.to(dtype), cross, B, A, scaling)
    # `squared` alone in float64 says that rows leave the range; that factors do is looked for where it costs no waiting
    if dtype == torch.float64 or (squared.dtype == dtype and not (total.is_cpu and not _in_range(total, n))):
        return total.sqrt_()
    wide = _squared_sum(squared.double(), cross if wide_cross is None else wide_cross, B, A, scaling)
    return torch.where(_keeps_precision(total, n), total.sqrt(), wide.sqrt().float())


def _squared_sum(squared: Tensor, cross: Tensor, B: Tensor, A: Tensor, scaling: float) -> Tensor:
    dtype = squared.dtype
    Bt = (scaling * B.to(dtype)).T.contiguous()  # (r, m): r long rows are quicker to work on than m short ones
    A = A.to(dtype)
    low_rank = torch.addmm(cross.to(dtype), A @ A.T, Bt, beta=2).mul_(Bt).sum(dim=0)
    return low_rank.add_(squared).clamp_min_(0)  # rounding can leave a vanishing row just below zero


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
        (m,) float32, or float64 for a float64 weight.
    """
    norms, rows, columns = [], len(weight) // groups, weight.shape[1]
    for g in range(groups):
        here = slice(g * rows, (g + 1) * rows)
        part = torch.cat([a.to(squared.dtype).chunk(groups)[g] for a in A])  # (ranks / groups, all columns)
        inside = part[:, g * columns : (g + 1) * columns]
        b = torch.cat([b[here] for b in B], dim=1)
        norms.append(merged_row_norms(weight[here], squared[here], b, inside, whole=part))
    return torch.cat(norms)


@torch.no_grad()
def vector_norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``||x||`` along the last dimension, of this dtype; right where a square leaves its range.

    Args:
        x: (..., n) floating point.

    Returns:
        (...).
    """
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    largest = x.to(dtype).abs().amax(dim=-1) if x.shape[-1] else norms
    tiny, huge = torch.finfo(dtype).smallest_normal ** 0.5, torch.finfo(dtype).max ** 0.5
    fits = (largest == 0) | ((largest > tiny / torch.finfo(dtype).eps) & (norms < huge))
    scaled = x.to(dtype) / torch.where(fits, 1, largest)[..., None]
    return torch.where(fits, norms, torch.linalg.vector_norm(scaled, dim=-1) * largest)


def no_autocast(device: str) -> AbstractContextManager:
    """No autocast inside."""
    # it would round the products; where it is off already, the context would cost more than they do
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
