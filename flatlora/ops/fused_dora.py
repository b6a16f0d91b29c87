"""A linear layer with DoRA as one autograd function.

    W' = W + s B A,  g_i = magnitude_i / ||W'_i||, where the norm is a constant for autograd (arXiv 2402.09353, 4.3)

    without dropout    y = g (x W^T + s (x A^T) B^T) + x eps^T + b
    with dropout       y = x (W + eps)^T + (g - 1) (x_d W^T) + g s (x_d A^T) B^T + b      x_d: x after dropout

This is what peft's DoRA computes, with eps in the merged weight g W'. The gradient of the magnitude is that of the
expression with constant eps, so it needs x W^T without noise:

    dL/dmagnitude_i = sum_t dL/dy_ti (x W^T + s (x A^T) B^T)_ti / ||W'_i||

Without dropout, the forward therefore has one product with W and one with eps. The backward has a single product:
with eps' = eps / g it is (g dL/dy) (W + eps'). peft also computes W' as a tensor, in each forward, for its row norms.
Here they come from one pass over W.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .autograd import Context, Gradients, apply
from .blocks import is_watched, row_blocks
from .checks import MAX_LAYERS, Matrix, expect, integer
from .fused_lora import Branch, RowNoise, branch_gradients, check_base, checked_branch
from .low_rank import Dropout, add_low_rank, is_wide, project
from .norms import no_autocast
from .products import (
    NoiseSettings,
    as_tensor_if_small,
    autocast_dtype,
    cast_inputs,
    linear_forward,
    linear_grad_bias,
    linear_grad_x,
    owned,
    sum_parts,
)
from .registry import backward_began


class _Options(NamedTuple):
    scaling: float
    branch_dtype: torch.dtype
    matrix: Matrix | None  # a weight in another form than a tensor
    dtype: torch.dtype  # of the base product
    clean_dtype: torch.dtype  # of the product without noise
    noise: NoiseSettings
    owner: int


def dora_linear(
    x: Tensor,  # (..., n)
    weight: Matrix,  # (m, n)
    bias: Tensor | None,  # (m,)
    branch: Branch,
    magnitude: Tensor,  # (m,)
    noise: RowNoise,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    owner: int = 0,
) -> Tensor:
    """A linear layer with DoRA, with the noise ``eps_ij = relative * |magnitude_i| * z_ij`` in its merged weight.

    Args:
        x, weight, bias, dtype, backend, owner: see `adapted_linear`.
        branch: the adapter.
        magnitude: (m,), the row norms of the merged weight; negative ones are allowed.
        noise: ``noise.norms`` are the row norms ``||W_i + s (B A)_i||``; ``compute_norms`` must be False.

    Returns:
        (..., m) of the dtype of the base product; of the dtype of x for a weight in another form.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    tensor, device = check_base(x, weight, bias, dtype)
    m, n = weight.shape
    A, B, scaling, dropped = checked_branch(branch, x, m, n, device)
    if isinstance(dropped, Dropout):
        raise TypeError("dropped must be x_d or None for DoRA, which multiplies x_d by W too, got a Dropout")
    expect("magnitude", magnitude, (m,), None, device)
    expect("norms", noise.norms, (m,), None, device)
    if noise.compute_norms:
        raise ValueError("compute_norms must be False for DoRA, which needs the row norms before the product, got True")
    out_dtype = x.dtype
    if tensor is None:
        dtype = dtype or x.dtype
    else:
        x, bias, dtype = cast_inputs(x, bias, tensor.dtype)
        out_dtype = dtype
    branch_dtype = autocast_dtype(x.device.type, A.dtype)
    settings = NoiseSettings(noise.layer, dtype, backend, noise.relative)
    # peft computes the second product in the precision of its input
    clean_dtype = dtype if dropped is None else autocast_dtype(x.device.type, dropped.dtype)
    whole, owner = weight if tensor is None else None, integer("owner", owner, 0, MAX_LAYERS)
    options = _Options(scaling, branch_dtype, whole, dtype, clean_dtype, settings, owner)
    with no_autocast(x.device.type):
        y = apply(_DoraLinear, x, dropped, tensor, bias, A, B, magnitude, noise.norms.detach(), noise.key, options)
    return y.to(out_dtype)


class _DoraLinear(Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        norms: Tensor,
        key: Tensor,
        options: _Options,
    ) -> Tensor:
        source, dtype = x if dropped is None else dropped, options.branch_dtype
        rows, std = _weight(weight, options), magnitude.detach().abs().to(norms.dtype)
        hidden = project(source, A, dtype, is_wide(A, B))
        clean = _clean_product(source, rows, options)
        if dropped is None:
            zeros = clean.new_zeros(()).expand(rows.shape)  # W = 0, so that W + eps is eps
            rest = out = linear_forward(x.to(options.dtype), zeros, bias, std, key, options.noise)
        else:
            out = linear_forward(x.to(options.dtype), rows, bias, std, key, options.noise)
            rest = out - clean
        merged = add_low_rank(clean, hidden * options.scaling, B.to(dtype).T)  # x W'^T
        out = _sum(merged * _gain(magnitude, norms), rest).to(out.dtype)
        need = ctx.needs_input_grad
        ctx.save_for_backward(
            source if need[4] or need[5] or need[6] else None,
            hidden if need[5] else None,
            merged if need[6] else None,
            weight, A, B, magnitude, norms, key,
        )  # fmt: skip
        ctx.has_dropout, ctx.options, ctx.dtype = dropped is not None, options, x.dtype
        return owned(out)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        options: _Options = ctx.options
        backward_began(options.owner)
        source, hidden, merged, tensor, A, B, magnitude, norms, key = ctx.saved_tensors
        need_x, need_dropped, _, need_bias, need_A, need_B, need_magnitude = ctx.needs_input_grad[:7]
        weight, gain = _weight(tensor, options), _gain(magnitude, norms)
        scaled, dtype = grad * gain, options.branch_dtype  # float32
        grad_hidden, grad_A, grad_B = branch_gradients(
            scaled, source, hidden, A, B, options.scaling, dtype, (need_A, need_B)
        )
        grad_x = grad_dropped = grad_magnitude = None
        if need_x and ctx.has_dropout:
            std = magnitude.detach().abs().to(norms.dtype)
            grad_x = linear_grad_x(grad.to(options.dtype), weight, std, key, options.noise).to(ctx.dtype)
        elif need_x:
            if torch.is_grad_enabled():  # eps' would have the derivative of g
                std, zeros = magnitude.detach().abs().to(norms.dtype), norms.new_zeros(()).expand(weight.shape)
                clean = _clean_gradient(scaled.to(options.dtype), weight)
                grad_x = clean + linear_grad_x(grad.to(options.dtype), zeros, std, key, options.noise)
            else:
                std = norms * magnitude.sign().to(norms.dtype)  # |magnitude| / g
                grad_x = linear_grad_x(scaled.to(options.dtype), weight, std, key, options.noise)
            in_place = not torch.is_grad_enabled()
            grad_x = add_low_rank(grad_x.to(ctx.dtype), grad_hidden, A.to(dtype), in_place=in_place)
        if need_dropped:
            grad_clean = _clean_gradient((scaled - grad).to(options.clean_dtype), weight)
            grad_dropped = (grad_clean + grad_hidden @ A.to(dtype)).to(source.dtype)
        if need_magnitude:
            if torch.is_grad_enabled():  # this backward is itself differentiated, and the saved one has no gradient
                low_rank = F.linear(F.linear(source.to(dtype), A.to(dtype)) * options.scaling, B.to(dtype))
                merged = _clean_product(source, weight, options) + low_rank
            per_row = (grad * merged.to(gain.dtype)).flatten(0, -2).sum(dim=0)
            grad_magnitude = (per_row / _rounded(norms, magnitude)).to(magnitude.dtype)
        grad_bias = linear_grad_bias(grad) if need_bias else None
        return grad_x, grad_dropped, None, grad_bias, grad_A, grad_B, grad_magnitude, None, None, None


def _weight(tensor: Tensor | None, options: _Options) -> Matrix:
    return as_tensor_if_small(cast(Matrix, options.matrix), options.dtype) if tensor is None else tensor


def _gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """g, (m,)."""
    return magnitude.to(norms.dtype) / _rounded(norms, magnitude)


def _rounded(norms: Tensor, magnitude: Tensor) -> Tensor:
    """The norms rounded to the dtype of the magnitudes, as in peft, so that g is 1 at first."""
    return norms.to(magnitude.dtype).to(norms.dtype)


def _clean_product(x: Tensor, weight: Matrix, options: _Options) -> Tensor:
    """``x W^T``."""
    x = x.to(options.clean_dtype)
    if isinstance(weight, Tensor) and weight.dtype == x.dtype:
        return owned(F.linear(x, weight))
    blocks = row_blocks(weight.shape[0], weight.shape[1], x.dtype.itemsize)
    return torch.cat([F.linear(x, weight[rows].to(x.dtype)) for rows in blocks], dim=-1)


def _clean_gradient(grad: Tensor, weight: Matrix) -> Tensor:
    """``dL/dy W``."""
    blocks = row_blocks(weight.shape[0], weight.shape[1], grad.dtype.itemsize)
    return sum_parts(grad[..., rows] @ weight[rows].to(grad.dtype) for rows in blocks)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return a + b if is_watched() else a.add_(b)
