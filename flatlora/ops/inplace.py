"""Add noise in place to a merged weight W + sBA that exists as a tensor."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function

from ..utils.arguments import boolean
from .autograd import Context, Gradients, apply
from .blocks import row_blocks, scratch
from .checks import expect
from .perturb import perturb_weight


def add_noise_(
    weight: Tensor,  # (m, n), or (experts, m, n) or (experts, n, m)
    row_std: Tensor,  # (m,) or (experts m,)
    key: Tensor,  # (2,) int64
    layer: int,
    *,
    transposed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``weight + eps`` in place, a block of rows at a time. The gradient is passed on unchanged; nothing is saved.

    Args:
        weight: (m, n), or a stack of such matrices, whose rows are numbered consecutively. It must be contiguous, and
            the backward of the operation that made it must not need its value.
        row_std: (rows,) standard deviation of each row, in the order of the stack.
        key, layer, backend: see `perturbed_linear`.
        transposed: the matrices of the stack are stored as (n, m).

    Returns:
        `weight`.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating-point tensor, got {what}")
    transposed = boolean("transposed", transposed)
    stack = weight.ndim == 3
    if weight.ndim not in (2, 3) or not weight.is_contiguous():
        raise ValueError(
            "weight must be a contiguous matrix or stack of matrices, got shape "
            f"{tuple(weight.shape)} and strides {weight.stride()}"
        )
    rows = weight.shape[0] * (weight.shape[2 if transposed else 1] if stack else 1)
    expect("row_std", row_std, (rows,), None, weight.device)
    return apply(_AddNoise, weight, row_std, key, layer, transposed, backend)


def matrices(weight: Tensor, transposed: bool) -> list[Tensor]:
    """Views of the (m, n) matrices of a stack, one output to a row."""
    if weight.ndim == 2:
        return [weight]
    return [matrix.T if transposed else matrix for matrix in weight]


class _AddNoise(Function):
    @staticmethod
    def forward(
        ctx: Context, weight: Tensor, row_std: Tensor, key: Tensor, layer: int, transposed: bool, backend: str
    ) -> Tensor:
        ctx.mark_dirty(weight)
        first = 0  # index of the matrix's first row in the stack
        for one in matrices(weight, transposed):
            for rows in row_blocks(one.shape[0], one.shape[1], one.element_size()):
                part, start = one[rows], first + rows.start
                out = scratch(part.shape, part.dtype, part.device)
                std = row_std[start : start + len(part)]
                part.copy_(perturb_weight(part, std, key, layer, start, backend=backend, out=out))
            first += one.shape[0]
        return weight

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        return grad, None, None, None, None, None
