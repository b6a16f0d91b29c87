"""Products of a large matrix with the factors of an adapter, which have few rows.

    project        x_d F^T       x: (..., n), F: (r, n)
    gather         L^T x_d       x: (..., n), L: (..., r)
    add_low_rank   out + L R_d   L: (..., r), R: (r, n)

The index d is dropout: x_d is x after it, and R_d stands for its gradient, elements of L R that were dropped being 0.
For a 16-bit x and factors in float32, a kernel reads x as it is stored, where torch needs a float32 copy of x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .blocks import is_watched

MIN_WIDTH = 128  # of a layer's inputs and outputs; below, calling the kernel takes longer than it saves
MAX_RANK = 16  # torch's products are faster above


class Dropout(NamedTuple):
    """``x_d = x * keep`` where the mask is True, else ``x * 0``.

    Attributes:
        mask: (..., n) bool, of the shape of x.
        keep: ``1 / (1 - p)``.
    """

    mask: Tensor
    keep: float


def is_wide(A: Tensor, B: Tensor) -> bool:
    """Whether the kernel is used for a layer with these factors, (r, n) and (m, r)."""
    return min(A.shape[1], B.shape[0]) >= MIN_WIDTH and A.shape[0] <= MAX_RANK


def reads(x: Tensor, factor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel can read x and multiply it with this factor in a product of this dtype."""
    return (
        dtype == torch.float32 == factor.dtype
        and not torch.is_grad_enabled()  # a backward that is itself differentiated
        and not is_watched()
        and native.has_factors(x, factor)
    )


def project(x: Tensor, factor: Tensor, dtype: torch.dtype, is_wide: bool, dropout: Dropout | None = None) -> Tensor:
    """``x_d F^T``, (..., r), in this dtype."""
    if is_wide and reads(x, factor, dtype):
        return native.project(rows(x), factor, *_flat(dropout)).view(*x.shape[:-1], len(factor))
    return F.linear(_dropped(x.to(dtype), dropout), factor.to(dtype))


def gather(left: Tensor, x: Tensor, dtype: torch.dtype, is_wide: bool, dropout: Dropout | None = None) -> Tensor:
    """``L^T x_d``, (r, n), in this dtype; the sum is over all dimensions but the last."""
    if is_wide and reads(x, left, dtype):
        return native.gather(rows(left), rows(x), *_flat(dropout))
    return rows(left).T @ rows(_dropped(x.to(dtype), dropout))


def dropout_of(x: Tensor, p: float, A: Tensor, B: Tensor, dtype: torch.dtype) -> Dropout | None:
    """Dropout of x that the kernel applies for an adapter whose products have this dtype; None where it does not.

    The mask is the one that `F.dropout` would draw, with the same numbers of the generator.
    """
    known = is_wide(A, B) and dtype == torch.float32 and native.has_factors(x, A)
    if not known or is_watched() or not 0 < p < 1:
        return None
    mask = torch.empty(x.shape, dtype=torch.bool, device="cpu").bernoulli_(1 - p)
    return Dropout(mask, torch.ones((), dtype=torch.float32, device="cpu").div_(1 - p).item())


def add_low_rank(
    out: Tensor, left: Tensor, right: Tensor, in_place: bool = True, dropout: Dropout | None = None
) -> Tensor:
    """``out + L R_d``, in place where that is allowed.

    The sum is computed in the wider dtype of the two and rounded to the dtype of `out`.
    """
    if dropout is not None:
        if in_place and reads(out, left, left.dtype) and native.has_sums(out, left, right):
            native.add_product(rows(out), rows(left), right, *_flat(dropout))
            return out
        return (out + _dropped(left @ right, dropout)).to(out.dtype)
    if not in_place or is_watched():
        return (out + left @ right).to(out.dtype)
    flat, left = out.view(-1, out.shape[-1]), rows(left)
    if out.dtype == left.dtype:
        flat.addmm_(left, right)
    elif left.dtype == torch.float32 and native.has_sums(out, left, right):
        native.add_product(flat, left, right)
    else:
        flat.add_(left @ right)
    return out


def rows(x: Tensor) -> Tensor:
    """A matrix, (..., n) as (t, n)."""
    return x.reshape(-1, x.shape[-1])


def _dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    return x if dropout is None else x * (dropout.mask.to(x.dtype) * dropout.keep)


def _flat(dropout: Dropout | None) -> tuple[Tensor | None, float]:
    return (None, 1.0) if dropout is None else (rows(dropout.mask), dropout.keep)
