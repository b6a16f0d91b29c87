"""Convolutions with the perturbed weight W + eps, without storing W + eps for the backward.

    y = conv(x, W + eps) + b         dL/dx = conv_transpose(dL/dy, W + eps)

For eps and for what autograd saves, see `products`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .autograd import Context, Gradients, apply
from .blocks import row_blocks
from .checks import expect, integer
from .products import NoiseSettings, cast_inputs, perturbed_block, sum_parts

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # stride, padding, dilation
CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


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
    """``conv(x, W + eps) + b`` in one, two or three dimensions; row i of W is the flattened filter of output channel i.

    Args:
        x: (batch, in, *spatial), or (in, *spatial) without a batch.
        weight: (m, in / groups, *kernel).
        bias, row_std, key, layer, backend: see `perturbed_linear`.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv1d/2d/3d`; the padding is zero.

    Returns:
        (batch, m, *spatial), or (m, *spatial) without a batch.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    _check(x, weight, bias, groups)
    x, bias, dtype = cast_inputs(x, bias, weight.dtype)
    batched = x.ndim == weight.ndim
    x = x if batched else x.unsqueeze(0)
    settings, geometry = NoiseSettings(layer, dtype, backend), (stride, padding, dilation)
    out = apply(_PerturbedConv, x, weight, bias, row_std, key, settings, geometry, groups)
    return out if batched else out.squeeze(0)


def _check(x: Any, weight: Any, bias: Any, groups: Any) -> None:
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


class _PerturbedConv(Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_std: Tensor,
        key: Tensor,
        settings: NoiseSettings,
        geometry: Geometry,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(weight, row_std, key, x if ctx.needs_input_grad[1] else None)
        ctx.settings, ctx.geometry, ctx.groups, ctx.shape = settings, geometry, groups, x.shape
        convolution = CONVOLUTIONS[weight.ndim - 3]
        parts = []
        for rows, channels, count, block in _channel_blocks(weight, row_std, key, groups, settings):
            part_bias = None if bias is None else bias[rows]
            parts.append(convolution(x[:, channels], block, part_bias, *geometry, count))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        weight, row_std, key, x = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        if need_x:
            parts: dict[int, list[Tensor]] = {}  # by first input channel; without groups all blocks read the same ones
            for rows, channels, count, block in _channel_blocks(weight, row_std, key, ctx.groups, ctx.settings):
                like = grad.new_empty(1).expand(ctx.shape[0], channels.stop - channels.start, *ctx.shape[2:])
                part = _gradient(grad[:, rows], like, block, ctx.geometry, count, of_weight=False)
                parts.setdefault(channels.start, []).append(part)
            grad_x = torch.cat([sum_parts(same) for same in parts.values()], dim=1)
        if need_weight:
            wide = _gradient(grad, x, weight.to(grad.dtype), ctx.geometry, ctx.groups, of_weight=True)
            grad_weight = wide.to(weight.dtype)
        if need_bias:
            grad_bias = grad.sum(dim=[0, *range(2, grad.ndim)])
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _channel_blocks(
    weight: Tensor, row_std: Tensor, key: Tensor, groups: int, settings: NoiseSettings
) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """(output channels, input channels, groups, block of W + eps) of blocks that each hold whole groups.

    Without groups a block may hold any range of output channels, and reads all input channels.
    """
    m, per_group, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
    size, flat = m // groups, weight.flatten(1)
    expect("row_std", row_std, (m,), None, weight.device)
    for rows in _whole_groups(m, flat.shape[1], settings.dtype.itemsize, 1 if groups == 1 else size):
        block = perturbed_block(flat[rows], row_std[rows], key, rows.start, settings)
        first, last = rows.start // size, -(-rows.stop // size)
        channels = slice(first * per_group, last * per_group)
        yield rows, channels, last - first, block.view(len(block), per_group, *kernel)


def _whole_groups(rows: int, columns: int, itemsize: int, size: int) -> Iterator[slice]:
    """Row blocks of whole groups of `size` rows."""
    for groups in row_blocks(rows // size, columns * size, itemsize):
        yield slice(groups.start * size, groups.stop * size)


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, *, of_weight: bool) -> Tensor:
    """Gradient of a convolution with respect to the weight or to x."""
    mask = [not of_weight, of_weight, False]
    not_transposed = (False, [0] * len(geometry[0]))
    backward = torch.ops.aten.convolution_backward
    return cast(Tensor, backward(grad, x, weight, None, *geometry, *not_transposed, groups, mask)[int(of_weight)])
