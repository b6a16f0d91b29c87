"""Linear products with the perturbed weight W + eps, without storing W + eps for the backward.

    y = x (W + eps)^T + b            dL/dx = dL/dy (W + eps)

eps_ij = row_std_i * z_ij is a constant for autograd. W + eps is generated one block of rows at a time in the forward,
and again in the backward from the same key, with the same bits. Beyond the frozen weight, autograd saves `row_std`,
O(m), and the two integers of the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import blocks
from .autograd import Context, Gradients, apply
from .blocks import row_blocks, scratch
from .checks import MAX_COLUMNS, MAX_LAYERS, MAX_ROWS, Matrix, expect, expect_columns, expect_factors, integer, matrix
from .four_bit import FourBitWeight
from .norms import no_autocast
from .perturb import ScaledFactors, perturb_weight
from .registry import backward_began

_unsafe_view = torch.ops.aten._unsafe_view.default


class NoiseSettings(NamedTuple):
    """How the noise of a product is generated.

    Attributes:
        layer: index of the layer in the noise stream.
        dtype: of W + eps.
        backend: see `perturb_weight`.
        relative: factor of the standard deviations of the rows, see `perturb_weight`.
        first_row, first_column: index of the weight's first element in the whole weight, of which it is a part.
    """

    layer: int
    dtype: torch.dtype
    backend: str
    relative: float | Tensor = 1.0
    first_row: int = 0
    first_column: int = 0


def perturbed_linear(
    x: Tensor,  # (..., n)
    weight: Tensor,  # (m, n)
    bias: Tensor | None,  # (m,)
    row_std: Tensor,  # (m,)
    key: Tensor,  # (2,) int64
    layer: int,
    *,
    backend: str = "auto",
    owner: int = 0,
    first_row: int = 0,
    first_column: int = 0,
) -> Tensor:
    """``x (W + eps)^T + b`` with ``eps_ij = row_std_i * z(key, layer, first_row + i, first_column + j)``.

    Under autocast x and b are cast as in `F.linear`, and W + eps is rounded once, from the precision of W to the
    autocast dtype. The gradients are those of the expression with constant eps.

    Args:
        x: (..., n) of the weight's dtype (any floating-point dtype under autocast).
        weight: (m, n), any strides; read, never written. It may require a gradient.
        bias: (m,) or None.
        row_std: (m,) float32, or float64 for a float64 weight: standard deviation of each row of eps.
        key: (2,) int64, the seed (with the data-parallel rank mixed in) and the sample.
        layer: index of the layer in the noise stream.
        backend: see `perturb_weight`.
        owner: number of the layer in `registry.LAYERS` whose `on_backward` is called when the backward of this product
            runs; 0 for none.
        first_row, first_column: index of ``weight[0, 0]`` in the whole weight, of which `weight` is a part (a shard of
            tensor parallelism). Only 0 in compiled code.

    Returns:
        (..., m).

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    if not torch.compiler.is_compiling():
        m, n = matrix("weight", weight)
        expect_columns("x", x, n)
        if bias is not None:
            expect("bias", bias, (m,), None, weight.device)
        owner = integer("owner", owner, 0, MAX_LAYERS)
        first_row = integer("first_row", first_row, 0, MAX_ROWS)
        first_column = integer("first_column", first_column, 0, MAX_COLUMNS)
    x, bias, dtype = cast_inputs(x, bias, weight.dtype)
    if torch.compiler.is_compiling():  # a custom operator, whose overhead eager calls avoid
        if first_row or first_column:
            raise ValueError(f"first_row and first_column must be 0 in compiled code, got {(first_row, first_column)}")
        address = torch.tensor([owner, layer], dtype=torch.int64, device="cpu")
        out = torch.ops.flatlora.perturbed_linear(x, weight, bias, row_std, key, address, dtype, backend)
        return cast(Tensor, out)
    settings = NoiseSettings(layer, dtype, backend, first_row=first_row, first_column=first_column)
    return apply(_PerturbedLinear, x, weight, bias, row_std, key, settings, owner)


class _PerturbedLinear(Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_std: Tensor,
        key: Tensor,
        settings: NoiseSettings,
        owner: int,
    ) -> Tensor:
        # only the gradient of W needs x, and W is usually frozen
        ctx.save_for_backward(weight, row_std, key, x if ctx.needs_input_grad[1] else None)
        ctx.settings, ctx.owner = settings, owner
        return linear_forward(x, weight, bias, row_std, key, settings)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        backward_began(ctx.owner)
        weight, row_std, key, x = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = linear_grad_x(grad, weight, row_std, key, ctx.settings) if need_x else None
        grad_weight = linear_grad_weight(grad, x, weight) if need_weight else None
        grad_bias = linear_grad_bias(grad) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


def rebuilt_linear(
    x: Tensor,  # (..., n)
    weight: Matrix,  # (m, n)
    bias: Tensor | None,  # (m,)
    row_std: Tensor,  # (m,)
    key: Tensor,  # (2,) int64
    layer: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """``x (W + eps)^T + b`` for a weight that is stored in another form, such as a quantized weight.

    The weight is rebuilt a block of rows at a time, in the forward and again in the backward. W + eps is rounded once,
    to the dtype of x, which is the dtype of the product, also under autocast.

    Args:
        x: (..., n).
        weight: (m, n), frozen; ``weight[rows]`` returns a block of its rows. A `FourBitWeight` is decoded in the kernel
            that adds the noise, if there is one for its device.
        bias: (m,) of x's dtype, or None.
        row_std, key, layer, backend: see `perturbed_linear`.

    Returns:
        (..., m) of x's dtype.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    m, n = matrix("weight", weight)
    expect_columns("x", x, n)
    if bias is not None:
        expect("bias", bias, (m,), None, None)
    with no_autocast(x.device.type):
        return apply(_RebuiltLinear, x, bias, weight, row_std, key, NoiseSettings(layer, x.dtype, backend))


class _RebuiltLinear(Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        bias: Tensor | None,
        weight: Matrix,
        row_std: Tensor,
        key: Tensor,
        settings: NoiseSettings,
    ) -> Tensor:
        ctx.save_for_backward(row_std, key)
        ctx.weight, ctx.settings = weight, settings
        return linear_forward(x, as_tensor_if_small(weight, x.dtype), bias, row_std, key, settings)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        row_std, key = ctx.saved_tensors
        need_x, need_bias = ctx.needs_input_grad[:2]
        weight = as_tensor_if_small(ctx.weight, grad.dtype)
        grad_x = linear_grad_x(grad, weight, row_std, key, ctx.settings) if need_x else None
        return grad_x, linear_grad_bias(grad) if need_bias else None, None, None, None, None


def as_tensor_if_small(weight: Matrix, dtype: torch.dtype) -> Matrix:
    """Rebuild a weight that fits into one block, unless the noise is added to it as it is stored."""
    m, n = weight.shape
    if isinstance(weight, FourBitWeight):
        return weight
    return weight[:m] if m * n * dtype.itemsize <= blocks.BLOCK_BYTES else weight


# ---- autocast ----


def autocast_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a product with a weight of this dtype. Autocast does not change float64."""
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def cast_inputs(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """x and b cast as by autocast, and the dtype of their product with a weight of this dtype."""
    device = x.device.type
    if device == "meta" or dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x, bias, dtype
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), None if bias is None else bias.to(dtype), dtype


# ---- forward and gradients, block by block ----


def linear_forward(
    x: Tensor,  # (..., n)
    weight: Matrix,  # (m, n)
    bias: Tensor | None,  # (m,)
    row_std: Tensor,  # (m,)
    key: Tensor,  # (2,) int64
    settings: NoiseSettings,
    factors: ScaledFactors | None = None,
) -> Tensor:
    """``x (W + eps)^T + b``, a block of rows at a time; `factors`: see `perturb_weight`."""
    out = None
    if bias is not None:
        expect("bias", bias, (weight.shape[0],), None, x.device)  # a weight in another form has no device
    for rows, block in _perturbed_blocks(weight, row_std, key, settings, factors):
        part = F.linear(x, block, None if bias is None else bias[rows])
        if len(block) == len(weight):
            return owned(part)
        out = part.new_empty(*x.shape[:-1], len(weight)) if out is None else out
        out[..., rows] = part
    assert out is not None
    return out


def owned(out: Tensor) -> Tensor:
    """Return a tensor that is no view.

    The result of `F.linear` may be a view of a matrix. Autograd does not allow to change a view in place
    (``nn.ReLU(inplace=True)``) if an autograd function has returned it.
    """
    return cast(Tensor, _unsafe_view(out, out.shape)) if out._is_view() else out


def linear_grad_x(grad: Tensor, weight: Matrix, row_std: Tensor, key: Tensor, settings: NoiseSettings) -> Tensor:
    """``dL/dy (W + eps)``, a block of rows at a time."""
    return sum_parts(
        (grad if len(block) == len(weight) else grad[..., rows]) @ block
        for rows, block in _perturbed_blocks(weight, row_std, key, settings)
    )


def linear_grad_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``dL/dy^T x``, of the weight's dtype."""
    return (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)


def linear_grad_bias(grad: Tensor) -> Tensor:
    """``dL/dy`` summed over all dimensions but the last."""
    return grad.reshape(-1, grad.shape[-1]).sum(dim=0)


def _perturbed_blocks(
    weight: Matrix, row_std: Tensor, key: Tensor, settings: NoiseSettings, factors: ScaledFactors | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks of W + eps, (rows, n) each, one alive at a time."""
    m, n = matrix("weight", weight)
    itemsize = settings.dtype.itemsize
    if m * n * itemsize <= blocks.BLOCK_BYTES:  # the usual case, without slices
        whole = cast("Tensor | FourBitWeight", weight)
        yield slice(0, m), perturbed_block(whole, row_std, key, 0, settings, factors)
        return
    expect("row_std", row_std, (m,), None, None)  # a slice of one that is too long would pass the check of a block
    if factors is not None:
        expect_factors(factors[0], factors[1], m, n, None)
    for rows in row_blocks(m, n, itemsize):
        part = None if factors is None else (factors[0][rows], factors[1], factors[2])
        block = weight.block_of_rows(rows) if isinstance(weight, FourBitWeight) else weight[rows]
        yield rows, perturbed_block(block, row_std[rows], key, rows.start, settings, part)


def perturbed_block(
    block: Tensor | FourBitWeight,  # (rows, n)
    row_std: Tensor,  # (rows,)
    key: Tensor,  # (2,) int64
    first_row: int,
    settings: NoiseSettings,
    factors: ScaledFactors | None = None,
) -> Tensor:
    """W + eps of a block of rows, in the scratch buffer if there is one."""
    layer, dtype, backend, relative, row, column = settings
    out = scratch(block.shape, dtype, block.device)
    return perturb_weight(
        block, row_std, key, layer, row + first_row,
        dtype=dtype, backend=backend, out=out, relative=relative, factors=factors, first_column=column,
    )  # fmt: skip


def sum_parts(parts: Iterable[Tensor]) -> Tensor:
    """Sum over row blocks. Several parts in low precision are summed in float32 and rounded once."""
    iterator = iter(parts)
    total, dtype = next(iterator), None
    for part in iterator:
        if dtype is None and total.dtype.itemsize < 4:
            dtype, total = total.dtype, total.float()
        total = total + part
    return total if dtype is None else total.to(dtype)
