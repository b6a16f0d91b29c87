"""Row norms of the merged weight, without forming the merged weight.

    W' = W + s B A            (several adapters: concatenated ranks, each scaling folded into its B)
    ||W'_i||^2 = ||W_i||^2 + 2 s (W A^T)_i . B_i + s^2 B_i (A A^T) B_i^T

Temporaries have r x r, m x r or m elements. Flat-LoRA (arXiv 2409.14396, eq. 7) needs these norms for each noise
sample; ||W_i||^2 belongs to the frozen weight and is computed once.

Sums of squares are computed in float32. Rows whose sum loses precision there are computed again in float64: those whose
root mean square is not between 4e-16 and 1.8e19 / sqrt(n), which does not occur for ordinary weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..utils.dtypes import accumulation_dtype
from . import native
from .blocks import row_blocks
from .checks import Matrix, expect, expect_factors, matrix, number

SMALLEST = 2.0**-102  # the smallest normal float32 / 2^-24: a larger mean square loses no precision to underflow
LARGEST = torch.finfo(torch.float32).max
ACCUMULATED = frozenset({torch.float32, torch.float64})

norm_dtype = accumulation_dtype  # its name in earlier versions


def _in_range(squared: Tensor, columns: int) -> bool:
    """Whether all of these float32 sums of `columns` squares have full precision. Synchronizes with a GPU."""
    if squared.numel() == 0:
        return True
    low, high = squared.aminmax()
    return float(low) >= columns * SMALLEST and float(high) <= LARGEST  # False for NaN


@torch.no_grad()
def squared_row_norms(weight: Matrix) -> Tensor:
    """``||W_i||^2`` of each row. It synchronizes with a GPU, so compute it once for each frozen weight.

    Args:
        weight: (m, n) floating-point, any strides; or a weight in another form that returns blocks of rows.

    Returns:
        (m,) float32; float64 for a float64 weight, and if the square of a row is out of the range of float32.

    Raises:
        TypeError, ValueError: not a floating-point matrix.
    """
    m, n = matrix("weight", weight)
    dtype = accumulation_dtype(weight.dtype)
    blocks = list(row_blocks(m, n, dtype.itemsize))
    if not blocks:
        return torch.zeros(0, dtype=dtype, device=getattr(weight, "device", None) or "cpu")
    squared = torch.cat([weight[rows].to(dtype).square().sum(dim=1) for rows in blocks])
    if dtype == torch.float64 or _is_captured(squared) or _in_range(squared, n):
        return squared
    wide = squared.double()
    for rows in blocks:
        (imprecise,) = torch.where(~_is_precise(squared[rows], n))
        if len(imprecise) > 0:
            wide[rows.start + imprecise] = weight[rows][imprecise].double().square().sum(dim=1)
    return squared if torch.equal(wide, squared.double()) else wide  # equal if the imprecise rows are zero


def _is_precise(squared: Tensor, columns: int) -> Tensor:
    return (squared >= columns * SMALLEST) & (squared <= LARGEST)


def _is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, during which synchronization is an error."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def row_norms(weight: Tensor) -> Tensor:
    """``||W_i||`` of each row, the square root of `squared_row_norms`, without synchronizing with a GPU.

    Args:
        weight: (m, n) floating-point, any strides.

    Returns:
        (m,) float32, or float64 for a float64 weight.
    """
    m, n = matrix("weight", weight)
    dtype = accumulation_dtype(weight.dtype)
    norms = torch.empty(m, dtype=dtype, device=weight.device)
    for rows in row_blocks(m, n, dtype.itemsize):
        block = weight[rows].to(dtype)
        squared = block.square().sum(dim=1)
        norms[rows] = squared.sqrt()
        if dtype == torch.float64 or (block.is_cpu and _in_range(squared, n)):
            continue
        wide = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).float()
        norms[rows] = torch.where(_is_precise(squared, n), norms[rows], wide)
    return norms


def sums_merged_rows(weight: Tensor) -> bool:
    """Whether `merged_row_norms` can do without `squared` for this weight: the C kernel sums the merged rows directly.

    Raises:
        TypeError: not a tensor.
    """
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
    """Row norms of the merged weight, ``||W_i + s (B A)_i||``; for the formula see `flatlora.ops.norms`.

    Args:
        weight: (m, n).
        squared: (m,) from `squared_row_norms(weight)`; None only if `sums_merged_rows(weight)`.
        B: (m, r).
        A: (r, n).
        scaling: s.
        whole: (r, N), the factor from which the columns of A are taken (grouped convolutions), for ``A A^T``.

    Returns:
        (m,) float32, or float64 for a float64 weight.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    m, n = matrix("weight", weight)
    scaling = number("scaling", scaling)
    if squared is not None:
        expect("squared", squared, (m,), ACCUMULATED, None)
    if whole is not None and matrix("whole", whole)[0] != len(A):
        raise ValueError(f"whole must be of shape ({len(A)}, N), got {tuple(whole.shape)}")
    if whole is None and sums_merged_rows(weight):
        return native.merged_row_norms(weight, B, A, scaling)
    expect_factors(B, A, m, n, weight.device)
    if squared is None:
        raise ValueError("squared must be squared_row_norms(weight) unless sums_merged_rows(weight), got None")
    dtype, wide = accumulation_dtype(weight.dtype), None
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
    """`merged_row_norms` from ``A W^T`` in place of W.

    Args:
        squared: (m,) float32 or float64, ``||W_i||^2``. With a float32 `cross`, float64 means that a row of W is out of
            the range of float32.
        cross: (r, m) float32 or float64, ``A W^T``.
        B, A, scaling: see `merged_row_norms`.

    Returns:
        (m,) of the dtype of `cross`.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    m = squared.numel() if isinstance(squared, Tensor) else 0
    expect("squared", squared, (m,), ACCUMULATED, None)
    n = matrix("A", A)[1]
    expect_factors(B, A, m, n, squared.device)
    expect("cross", cross, (A.shape[0], m), ACCUMULATED, squared.device)
    with no_autocast(squared.device.type):
        return _norms_of_sum(squared, cross, B, A, number("scaling", scaling))


def _norms_of_sum(
    squared: Tensor, cross: Tensor, B: Tensor, A: Tensor, scaling: float, wide_cross: Tensor | None = None
) -> Tensor:
    dtype, n = cross.dtype, A.shape[1]
    total = _squared_sum(squared.to(dtype), cross, B, A, scaling)
    # a float64 `squared` with a float32 `cross` means that rows are out of range; factors that are out of range are
    # detected only on the CPU, where this needs no synchronization
    if dtype == torch.float64 or (squared.dtype == dtype and not (total.is_cpu and not _in_range(total, n))):
        return total.sqrt_()
    wide = _squared_sum(squared.double(), cross if wide_cross is None else wide_cross, B, A, scaling)
    return torch.where(_is_precise(total, n), total.sqrt(), wide.sqrt().float())


def _squared_sum(squared: Tensor, cross: Tensor, B: Tensor, A: Tensor, scaling: float) -> Tensor:
    dtype = squared.dtype
    Bt = (scaling * B.to(dtype)).T.contiguous()  # (r, m): r long rows are faster than m short ones
    A = A.to(dtype)
    low_rank = torch.addmm(cross.to(dtype), A @ A.T, Bt, beta=2).mul_(Bt).sum(dim=0)
    return low_rank.add_(squared).clamp_min_(0)  # rounding can make the sum of a row near zero negative


@torch.no_grad()
def grouped_row_norms(
    weight: Tensor,  # (m, n)
    squared: Tensor,  # (m,)
    B: list[Tensor],  # (m, r / groups) each
    A: list[Tensor],  # (r, groups n) each
    groups: int,
) -> Tensor:
    """Row norms of the merged weight of a grouped convolution with one or several adapters.

    W is zero outside of the input channels of its group, but lora_A reads all input channels: the output channels of
    group g use the g-th part of lora_A's rows, over the whole input. The cross term therefore takes the columns of the
    group from A, and the quadratic term takes all columns.

    Args:
        weight: (m, n), n counted within a group.
        squared: (m,) from `squared_row_norms(weight)`.
        B, A: factors of each adapter, scalings folded into B.
        groups: number of groups.

    Returns:
        (m,) float32, or float64 for a float64 weight.
    """
    norms, rows, columns = [], len(weight) // groups, weight.shape[1]
    for g in range(groups):
        group = slice(g * rows, (g + 1) * rows)
        part = torch.cat([a.to(squared.dtype).chunk(groups)[g] for a in A])  # (ranks / groups, all columns)
        inside = part[:, g * columns : (g + 1) * columns]
        b = torch.cat([b[group] for b in B], dim=1)
        norms.append(merged_row_norms(weight[group], squared[group], b, inside, whole=part))
    return torch.cat(norms)


@torch.no_grad()
def vector_norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``||x||`` along the last dimension, of this dtype; correct also if a square is out of its range.

    Args:
        x: (..., n) floating-point.
        dtype: float32 or float64.

    Returns:
        (...).
    """
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    largest = x.to(dtype).abs().amax(dim=-1) if x.shape[-1] else norms
    tiny, huge = torch.finfo(dtype).smallest_normal ** 0.5, torch.finfo(dtype).max ** 0.5
    fits = (largest == 0) | ((largest > tiny / torch.finfo(dtype).eps) & (norms < huge))
    scaled = x.to(dtype) / torch.where(fits, 1, largest)[..., None]
    return torch.where(fits, norms, torch.linalg.vector_norm(scaled, dim=-1) * largest)


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Disable autocast, which would round the products."""
    # if it is disabled already, entering torch's context would take longer than the products
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
