"""Products with the perturbed weight, W + eps, that save neither it nor anything of its size.

    linear:       y = x (W + eps)^T + b            dL/dx = dL/dy (W + eps)
    convolution:  y = conv(x, W + eps) + b         dL/dx = conv_transpose(dL/dy, W + eps)

eps_ij = row_std_i * z_ij is a constant for autograd. W + eps is made one block of rows at a time in forward, made again
in backward from the same key, and has the same bits then. What is saved beyond the frozen weight itself is `row_std`,
O(m), and the two integers of the key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import blocks
from .blocks import row_blocks, scratch
from .operands import LAYERS, expect, expect_columns, expect_factors, integer, matrix
from .perturb import Factors, perturb_weight
from .registry import backward_began

_unsafe_view = torch.ops.aten._unsafe_view.default


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
) -> Tensor:
    """``x (W + eps)^T + b`` with ``eps_ij = row_std_i * z(key, layer, i, j)``.

    Under autocast x and b are cast as `F.linear` would cast them, and W + eps is rounded once, from W's own precision
    into the autocast dtype.

    Args:
        x: (..., n) of the weight's dtype (any floating dtype under autocast).
        weight: (m, n), any strides; read, never written. If it requires a gradient it gets the one of the expression.
        bias: (m,) or None.
        row_std: (m,) float32, float64 for a float64 weight.
        key: (2,) int64, the seed with the data-parallel rank mixed in, and the sample.
        layer: index of the layer in the noise stream.
        backend: see `perturb_weight`.
        owner: number of the layer in `registry.LAYERS` whose `on_backward` is called when the backward of this product
            runs; 0 for none.

    Returns:
        (..., m).
    """
    if not torch.compiler.is_compiling():
        m, n = matrix("weight", weight)
        expect_columns("x", x, n)
        if bias is not None:
            expect("bias", bias, (m,), None, weight.device)
        owner = integer("owner", owner, 0, LAYERS)
    x, bias, dtype = cast_inputs(x, bias, weight.dtype)
    if torch.compiler.is_compiling():  # the registered operator; eager calls are spared its overhead
        address = torch.tensor([owner, layer], dtype=torch.int64, device="cpu")
        return torch.ops.flatlora.perturbed_linear(x, weight, bias, row_std, key, address, dtype, backend)
    return _PerturbedLinear.apply(x, weight, bias, row_std, key, layer, dtype, backend, owner)


def perturbed_conv(
    x: Tensor,  # (batch, in, *spatial)
    weight: Tensor,  # (m, in / groups, *kernel)
    bias: Tensor | None,  # (m,)
    row_std: Tensor,  # (m,)
    key: Tensor,  # (2,) int64
    layer: int,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    backend: str = "auto",
) -> Tensor:
    """``conv(x, W + eps) + b`` in one, two or three dimensions; row i of W is output channel i, flattened.

    Arguments as in `perturbed_linear` and `torch.nn.functional.conv1d/2d/3d`; the padding is of zeros.

    Returns:
        (batch, m, *spatial).
    """
    _check_conv(x, weight, bias, groups)
    x, bias, dtype = cast_inputs(x, bias, weight.dtype)
    batched = x.ndim == weight.ndim
    x = x if batched else x.unsqueeze(0)
    geometry = (stride, padding, dilation)
    out = _PerturbedConv.apply(x, weight, bias, row_std, key, layer, dtype, backend, geometry, groups)
    return out if batched else out.squeeze(0)


def _check_conv(x: Any, weight: Any, bias: Any, groups: Any) -> None:
    integer("groups", groups, 1, 1 << 32)
    for name, tensor, dims in (("weight", weight, (3, 4, 5)), ("x", x, None)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {what}")
        if tensor.ndim not in (dims or (weight.ndim - 1, weight.ndim)):
            wanted = "3 to 5" if dims else f"{weight.ndim}, or {weight.ndim - 1} without a batch,"
            raise ValueError(f"{name} must have {wanted} dimensions, got shape {tuple(tensor.shape)}")
    if bias is not None:
        expect("bias", bias, (weight.shape[0],), None, weight.device)


def autocast_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a product with a weight of this dtype is made: autocast leaves float64 alone."""
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def cast_inputs(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """x, b and the dtype in which their product with a weight of `dtype` is made, as autocast has it."""
    device = x.device.type
    if device == "meta" or dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x, bias, dtype
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), None if bias is None else bias.to(dtype), dtype


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_std: Tensor,
    key: Tensor,
    *settings: Any,
    factors: Factors | None = None,
) -> Tensor:
    """``x (W + eps)^T + b``, a block of rows at a time.

    Args:
        settings: layer, dtype, backend, and what `row_std` is a multiple of if it is not 1.
        factors: see `perturb_weight`.
    """
    out = None
    if bias is not None:
        expect("bias", bias, (weight.shape[0],), None, x.device)  # a stored weight has no device
    for rows, block in _blocks(weight, row_std, key, *settings, factors=factors):
        part = F.linear(x, block, None if bias is None else bias[rows])
        if len(block) == len(weight):
            return owned(part)
        out = part.new_empty(*x.shape[:-1], len(weight)) if out is None else out
        out[..., rows] = part
    assert out is not None
    return out


def owned(out: Tensor) -> Tensor:
    """A result of `F.linear`, which may be a view of one of two dimensions: what a Function returns must be none, or
    it could not be changed in place (``nn.ReLU(inplace=True)``)."""
    return _unsafe_view(out, out.shape) if out._is_view() else out


def linear_grad_x(grad: Tensor, weight: Tensor, row_std: Tensor, key: Tensor, *settings: Any) -> Tensor:
    """``dL/dy (W + eps)``, a block of rows at a time."""
    return _sum(
        (grad if len(block) == len(weight) else grad[..., rows]) @ block
        for rows, block in _blocks(weight, row_std, key, *settings)
    )


def linear_grad_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``dL/dy^T x``, of the weight's dtype."""
    return (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)


def linear_grad_bias(grad: Tensor) -> Tensor:
    """``dL/dy`` summed over all but the last dimension."""
    return grad.reshape(-1, grad.shape[-1]).sum(dim=0)


def _blocks(
    weight: Tensor,
    row_std: Tensor,
    key: Tensor,
    layer: int,
    dtype: torch.dtype,
    backend: str,
    relative: float = 1.0,
    *,
    factors: Factors | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks of W + eps, (rows, n) each, one alive at a time."""
    m, n = matrix("weight", weight)
    if m * n * dtype.itemsize <= blocks.BLOCK_BYTES:  # the usual case, without slices
        out = scratch(weight.shape, dtype, weight.device)
        yield (
            slice(0, m),
            perturb_weight(
                weight, row_std, key, layer, dtype=dtype, backend=backend, out=out, relative=relative, factors=factors
            ),
        )
        return
    expect("row_std", row_std, (m,), None, None)  # as a whole: a part of what is too long would do
    if factors is not None:
        expect_factors(factors[0], factors[1], m, n, None)
    for rows in row_blocks(m, n, dtype.itemsize):
        part = weight[rows]
        out, here = scratch(part.shape, dtype, part.device), factors and (factors[0][rows], *factors[1:])
        yield rows, perturb_weight(
            part, row_std[rows], key, layer, rows.start,
            dtype=dtype, backend=backend, out=out, relative=relative, factors=here,
        )  # fmt: skip


class _PerturbedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, row_std, key, layer, dtype, backend, owner):
        # x is needed for the gradient of W alone, and W is frozen unless the user says otherwise
        ctx.save_for_backward(weight, row_std, key, x if ctx.needs_input_grad[1] else None)
        ctx.settings, ctx.owner = (layer, dtype, backend), owner
        return linear_forward(x, weight, bias, row_std, key, *ctx.settings)

    @staticmethod
    def backward(ctx: Any, grad):
        backward_began(ctx.owner)
        weight, row_std, key, x = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = linear_grad_x(grad, weight, row_std, key, *ctx.settings) if need_x else None
        grad_weight = linear_grad_weight(grad, x, weight) if need_weight else None
        grad_bias = linear_grad_bias(grad) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


class _PerturbedConv(Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, row_std, key, layer, dtype, backend, geometry, groups):
        ctx.save_for_backward(weight, row_std, key, x if ctx.needs_input_grad[1] else None)
        ctx.settings, ctx.geometry, ctx.groups, ctx.shape = (layer, dtype, backend), geometry, groups, x.shape
        convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
        parts = []
        for rows, channels, count, block in _channel_blocks(weight, row_std, key, groups, *ctx.settings):
            here = None if bias is None else bias[rows]
            parts.append(convolution(x[:, channels], block, here, *geometry, count))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad):
        weight, row_std, key, x = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        if need_x:
            parts: dict[int, list[Tensor]] = {}  # by first input channel: without groups all blocks share one
            for rows, channels, count, block in _channel_blocks(weight, row_std, key, ctx.groups, *ctx.settings):
                shape = (ctx.shape[0], channels.stop - channels.start, *ctx.shape[2:])
                part = _conv_gradients(grad[:, rows], grad.new_empty(1).expand(shape), block, ctx.geometry, count, 0)
                parts.setdefault(channels.start, []).append(part)
            grad_x = torch.cat([_sum(iter(same)) for same in parts.values()], dim=1)
        if need_weight:
            grad_weight = _conv_gradients(grad, x, weight.to(grad.dtype), ctx.geometry, ctx.groups, 1).to(weight.dtype)
        if need_bias:
            grad_bias = grad.sum(dim=[0, *range(2, grad.ndim)])
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None, None


def _channel_blocks(
    weight: Tensor, row_std: Tensor, key: Tensor, groups: int, layer: int, dtype: torch.dtype, backend: str
) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """(output channels, input channels, groups, block of W + eps) of blocks that each hold whole groups.

    Without groups any run of output channels will do, and each of them reads all input channels.
    """
    m, per_group, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
    size, flat = m // groups, weight.flatten(1)
    expect("row_std", row_std, (m,), None, weight.device)
    for rows in _whole_groups(m, flat.shape[1], dtype.itemsize, 1 if groups == 1 else size):
        out = scratch(flat[rows].shape, dtype, flat.device)
        block = perturb_weight(flat[rows], row_std[rows], key, layer, rows.start, dtype=dtype, backend=backend, out=out)
        first, last = rows.start // size, -(-rows.stop // size)
        channels = slice(first * per_group, last * per_group)
        yield rows, channels, last - first, block.view(len(block), per_group, *kernel)


def _whole_groups(rows: int, columns: int, itemsize: int, size: int) -> Iterator[slice]:
    for groups in row_blocks(rows // size, columns * size, itemsize):
        yield slice(groups.start * size, groups.stop * size)


def _conv_gradients(grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple, groups: int, which: int) -> Tensor:
    """Gradient of a convolution with respect to x (which = 0) or to the weight (which = 1)."""
    mask = [which == 0, which == 1, False]
    not_transposed = (False, [0] * len(geometry[0]))
    backward = torch.ops.aten.convolution_backward
    return backward(grad, x, weight, None, *geometry, *not_transposed, groups, mask)[which]


def _sum(parts: Iterator[Tensor]) -> Tensor:
    """The sum over row blocks; of several in low precision, in float32, rounded once."""
    total, dtype = next(parts), None
    for part in parts:
        if dtype is None and total.dtype.itemsize < 4:
            dtype, total = total.dtype, total.float()
        total = total + part
    return total if dtype is None else total.to(dtype)
