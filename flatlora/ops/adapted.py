"""An adapted linear layer in one autograd node: the base product and the low-rank branch together.

    y      = x (W + eps)^T + b + s (x_d A^T) B^T        x_d: x after dropout, or x itself
    dL/dx  = dL/dy (W + eps) [+ dL/dx_d where x_d is x]    dL/dx_d = s (dL/dy B) A
    dL/dB  = s dL/dy^T (x_d A^T)                           dL/dA   = s (dL/dy B)^T x_d

The same mathematics as a base product and two small modules after one another, in less traffic: s is applied to the r
columns between A and B, the branch is added in place, and x is saved as it came, not as a copy in the precision of A.
That more than pays for the noise. eps and what is saved for it: see `products`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import native
from .blocks import is_watched
from .operands import LAYERS, boolean, expect, expect_columns, expect_factors, integer, matrix, number
from .products import (
    autocast_dtype,
    cast_inputs,
    linear_forward,
    linear_grad_bias,
    linear_grad_weight,
    linear_grad_x,
    owned,
)
from .registry import backward_began


class RowNoise(NamedTuple):
    """``eps_ij = relative * norms_i * z(key, layer, i, j)``.

    Attributes:
        norms: (m,) float32, float64 for a float64 weight.
        relative: what the standard deviation of a row is of its norm.
        key, layer: as in `perturbed_linear`.
        stale: first write the row norms of W + s B A into `norms`; where `makes_norms` says that it can be done.
    """

    norms: Tensor
    relative: float
    key: Tensor
    layer: int
    stale: bool = False


def lora_linear(
    x: Tensor,  # (..., n)
    weight: Tensor,  # (m, n)
    bias: Tensor | None,  # (m,)
    A: Tensor,  # (r, n)
    B: Tensor,  # (m, r)
    scaling: float,
    noise: RowNoise | None = None,
    *,
    dropped: Tensor | None = None,  # (..., n)
    backend: str = "auto",
    owner: int = 0,
) -> Tensor:
    """``x (W + eps)^T + b + s (x_d A^T) B^T``, eps = 0 without `noise`.

    The base product is of the weight's dtype, the branch of A's; under autocast both are of the autocast dtype. The sum
    is made in the wider of the two and rounded once.

    Args:
        x: (..., n) of the weight's dtype (any floating dtype under autocast).
        weight, bias, backend: as in `perturbed_linear`.
        A, B: (r, n) and (m, r), of one dtype.
        scaling: s.
        dropped: x_d, of A's dtype; None if it is x.
        owner: number of the layer in `registry.LAYERS` whose `on_backward` is called when the backward of this product
            runs; 0 for none.

    Returns:
        (..., m) of the dtype of the base product.

    Raises:
        TypeError, ValueError: weight, bias, A, B and the noise do not fit each other.
    """
    m, n = matrix("weight", weight)
    expect_columns("x", x, n)
    expect_factors(B, A, m, n, weight.device)
    if bias is not None:
        expect("bias", bias, (m,), None, weight.device)
    if dropped is not None:
        expect_columns("dropped", dropped, n)
    owner = integer("owner", owner, 0, LAYERS)
    scaling = number("scaling", scaling)
    x, bias, dtype = cast_inputs(x, bias, weight.dtype)
    low = autocast_dtype(x.device.type, A.dtype)
    if dropped is not None and low.itemsize < dropped.dtype.itemsize:
        dropped = dropped.to(low)  # here, not in the node: it is saved, and the wider copy is not
    norms, key, stale, settings = None, None, False, None
    if noise is not None:
        if not isinstance(noise, RowNoise):
            raise TypeError(f"noise must be a RowNoise or None, got {type(noise).__name__}")
        norms, key, stale = noise.norms, noise.key, noise.stale
        expect("norms", norms, (m,), None, weight.device)
        boolean("stale", stale)
        settings = (noise.layer, dtype, backend, noise.relative)
    return _LoraLinear.apply(x, dropped, weight, bias, A, B, norms, key, (scaling, low, settings, stale, owner))


class _LoraLinear(Function):
    @staticmethod
    def forward(ctx: Any, x, dropped, weight, bias, A, B, norms, key, options):
        scaling, low, settings, stale, owner = options
        source = x if dropped is None else dropped
        hidden = F.linear(source.to(low), A.to(low))  # (..., r)
        if settings is None:
            out = owned(F.linear(x, weight.to(x.dtype), bias))
        else:
            factors = (B, A, scaling) if stale else None
            out = linear_forward(x, weight, bias, norms, key, *settings, factors=factors)
        out = _plus_product(out, hidden * scaling, B.to(low).T)
        need_x, _, need_weight, _, need_A, need_B = ctx.needs_input_grad[:6]
        ctx.save_for_backward(
            x if need_weight else None,
            source if need_A or need_B else None,
            hidden if need_B else None,
            weight, A, B, norms, key,
        )  # fmt: skip
        ctx.separate, ctx.scaling, ctx.low, ctx.settings, ctx.owner = dropped is not None, scaling, low, settings, owner
        return out

    @staticmethod
    def backward(ctx: Any, grad):
        backward_began(ctx.owner)
        x, source, hidden, weight, A, B, norms, key = ctx.saved_tensors
        need_x, need_dropped, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        low, twice = ctx.low, torch.is_grad_enabled()  # twice: this backward is itself differentiated
        grad_low = grad.to(low)
        small = (grad_low @ B.to(low)) * ctx.scaling  # (..., r): dL/d(x_d A^T)
        grad_A = grad_B = grad_dropped = None
        if need_A:
            grad_A = (_rows(small).T @ _rows(source.to(low))).to(A.dtype)
        if need_B:
            hidden = F.linear(source.to(low), A.to(low)) if twice else hidden  # what is saved knows no gradient
            grad_B = (_rows(grad_low).T @ _rows(hidden * ctx.scaling)).to(B.dtype)
        del grad_low
        grad_x = None
        if need_x:
            noisy = ctx.settings is not None
            grad_x = linear_grad_x(grad, weight, norms, key, *ctx.settings) if noisy else grad @ weight.to(grad.dtype)
            if not ctx.separate:
                grad_x = _plus_product(grad_x, small, A.to(low), in_place=not twice)
        if need_dropped:
            grad_dropped = small @ A.to(low)
        grad_weight = linear_grad_weight(grad, x, weight) if need_weight else None
        grad_bias = linear_grad_bias(grad) if need_bias else None
        return grad_x, grad_dropped, grad_weight, grad_bias, grad_A, grad_B, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _plus_product(out: Tensor, left: Tensor, right: Tensor, in_place: bool = True) -> Tensor:
    """``out + left @ right``, the sum in the wider precision of the two, rounded to that of `out`."""
    if not in_place or is_watched():
        return (out + left @ right).to(out.dtype)
    flat, left = out.view(-1, out.shape[-1]), _rows(left)
    if out.dtype == left.dtype:
        flat.addmm_(left, right)
    elif left.dtype == torch.float32 and native.has_sums(out, left, right):
        native.add_product(flat, left, right)
    else:
        flat.add_(left @ right)
    return out
