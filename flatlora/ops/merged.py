"""Products with W + eps where the whole weight is no tensor at hand, or is one already.

`rebuilt_linear`      W is stored in another form, and its rows are floating-point numbers only for a moment
`add_noise_`          the merged weight W + sBA has been made by others, as a whole: eps is added to it in place
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from . import blocks
from .blocks import row_blocks, scratch
from .norms import no_autocast
from .operands import boolean, expect, expect_columns, matrix
from .perturb import perturb_weight
from .products import linear_forward, linear_grad_bias, linear_grad_x


class Rows(Protocol):
    """A matrix that gives blocks of its rows when asked, a new tensor each time."""

    shape: torch.Size  # (m, n)
    dtype: torch.dtype  # of the blocks

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


def rebuilt_linear(
    x: Tensor,  # (..., n)
    weight: Rows,  # (m, n)
    bias: Tensor | None,  # (m,)
    row_std: Tensor,  # (m,)
    key: Tensor,  # (2,) int64
    layer: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """``x (W + eps)^T + b`` as `perturbed_linear` computes it, W rebuilt a block at a time, in backward once more.

    W + eps is rounded once, to x's dtype, in which the product is made, under autocast too.

    Args:
        x: (..., n).
        weight: (m, n), frozen.
        bias: (m,) of x's dtype, or None.
        row_std, key, layer, backend: as in `perturbed_linear`.

    Returns:
        (..., m) of x's dtype.
    """
    m, n = matrix("weight", weight)
    expect_columns("x", x, n)
    if bias is not None:
        expect("bias", bias, (m,), None, None)
    with no_autocast(x.device.type):
        return _RebuiltLinear.apply(x, bias, weight, row_std, key, (layer, x.dtype, backend))


class _RebuiltLinear(Function):
    @staticmethod
    def forward(ctx: Any, x, bias, weight, row_std, key, settings):
        ctx.save_for_backward(row_std, key)
        ctx.weight, ctx.settings = weight, settings
        return linear_forward(x, _at_hand(weight, x.dtype), bias, row_std, key, *settings)

    @staticmethod
    def backward(ctx: Any, grad):
        row_std, key = ctx.saved_tensors
        need_x, need_bias = ctx.needs_input_grad[:2]
        weight = _at_hand(ctx.weight, grad.dtype)
        grad_x = linear_grad_x(grad, weight, row_std, key, *ctx.settings) if need_x else None
        return grad_x, linear_grad_bias(grad) if need_bias else None, None, None, None, None


def _at_hand(weight: Any, dtype: torch.dtype) -> Any:
    """A weight that fits into one block as a tensor."""
    m, n = weight.shape
    return weight[:m] if m * n * dtype.itemsize <= blocks.BLOCK_BYTES else weight


def add_noise_(
    weight: Tensor,  # (m, n), or (experts, m, n) or (experts, n, m)
    row_std: Tensor,  # (m,) or (experts m,)
    key: Tensor,  # (2,) int64
    layer: int,
    *,
    transposed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``weight + eps`` in place, a block of rows at a time. The gradient passes unchanged, and nothing is saved.

    Args:
        weight: (m, n), or a stack of such matrices, whose rows are counted through. Contiguous, and not needed as it
            was for the backward of what has made it.
        row_std: (rows,) in the order of the stack.
        key, layer, backend: as in `perturbed_linear`.
        transposed: the matrices of the stack are stored as (n, m).

    Returns:
        `weight`.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating-point tensor, got {what}")
    boolean("transposed", transposed)
    stack = weight.ndim == 3
    if weight.ndim not in (2, 3) or not weight.is_contiguous():
        raise ValueError(
            "weight must be a contiguous matrix or stack of matrices, got shape "
            f"{tuple(weight.shape)} and strides {weight.stride()}"
        )
    rows = weight.shape[0] * (weight.shape[2 if transposed else 1] if stack else 1)
    expect("row_std", row_std, (rows,), None, weight.device)
    return _AddNoise.apply(weight, row_std, key, layer, transposed, backend)


def matrices(weight: Tensor, transposed: bool) -> list[Tensor]:
    """The (m, n) matrices of a stack, as views: one output to a row."""
    if weight.ndim == 2:
        return [weight]
    return [matrix.T if transposed else matrix for matrix in weight]


class _AddNoise(Function):
    @staticmethod
    def forward(ctx: Any, weight, row_std, key, layer, transposed, backend):
        ctx.mark_dirty(weight)
        first = 0
        for one in matrices(weight, transposed):
            for rows in row_blocks(one.shape[0], one.shape[1], one.element_size()):
                part, here = one[rows], first + rows.start
                out = scratch(part.shape, part.dtype, part.device)
                std = row_std[here : here + len(part)]
                part.copy_(perturb_weight(part, std, key, layer, here, backend=backend, out=out))
            first += one.shape[0]
        return weight

    @staticmethod
    def backward(ctx: Any, grad):
        return grad, None, None, None, None, None
