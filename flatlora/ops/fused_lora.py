"""A linear layer with its adapter as one autograd function.

    y      = x (W + eps)^T + b + s (x_d A^T) B^T        x_d: x after dropout, or x itself
    dL/dx  = dL/dy (W + eps) [+ dL/dx_d if x_d is x]    dL/dx_d = s (dL/dy B) A
    dL/dB  = s dL/dy^T (x_d A^T)                        dL/dA   = s (dL/dy B)^T x_d

Compared with a base product followed by two small modules, it moves less memory: s is applied to the r columns between
A and B, the low-rank branch is added in place, and x is saved as given, not as a copy in the precision of A. This saves
more time than the noise costs. For eps and for what autograd saves, see `products`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..utils.arguments import boolean
from . import native
from .autograd import Context, Gradients, apply
from .blocks import is_watched
from .checks import MAX_LAYERS, expect, expect_columns, expect_factors, integer, matrix, number
from .products import (
    NoiseSettings,
    autocast_dtype,
    cast_inputs,
    linear_forward,
    linear_grad_bias,
    linear_grad_weight,
    linear_grad_x,
    owned,
)
from .registry import backward_began


class _RowNoise(NamedTuple):
    norms: Tensor
    relative: float
    key: Tensor
    layer: int
    compute_norms: bool


class RowNoise(_RowNoise):
    """Noise relative to the norm of each row: ``eps_ij = relative * norms_i * z(key, layer, i, j)``.

    Attributes:
        norms: (m,) float32, or float64 for a float64 weight.
        relative: ratio of standard deviation to row norm.
        key, layer: see `perturbed_linear`.
        compute_norms: first write the row norms of W + s B A into `norms`; only if `makes_norms` returns True. Its
            former name `stale` is accepted as a keyword and as an attribute.
    """

    __slots__ = ()

    def __new__(
        cls,
        norms: Tensor,
        relative: float,
        key: Tensor,
        layer: int,
        compute_norms: bool = False,
        *,
        stale: bool | None = None,
    ) -> RowNoise:
        if stale is not None:
            compute_norms = boolean("stale", stale)
        return super().__new__(cls, norms, relative, key, layer, compute_norms)

    def _replace(self, **changes: Any) -> RowNoise:
        if "stale" in changes:
            changes["compute_norms"] = changes.pop("stale")
        return super()._replace(**changes)

    @property
    def stale(self) -> bool:
        """The former name of `compute_norms`."""
        return self.compute_norms


class _Options(NamedTuple):
    scaling: float  # s
    branch_dtype: torch.dtype  # of the low-rank branch
    noise: NoiseSettings | None
    compute_norms: bool
    owner: int


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
    """``x (W + eps)^T + b + s (x_d A^T) B^T``; eps = 0 without `noise`.

    The base product has the weight's dtype, and the low-rank branch that of A; under autocast both have the autocast
    dtype. They are added in the wider of the two dtypes, and the sum is rounded once.

    Args:
        x: (..., n) of the weight's dtype (any floating-point dtype under autocast).
        weight, bias, backend, owner: see `perturbed_linear`.
        A, B: (r, n) and (m, r), of one dtype.
        scaling: s.
        noise: eps, or None for none.
        dropped: x_d, of A's dtype; None if it is x.

    Returns:
        (..., m) of the dtype of the base product.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    m, n = matrix("weight", weight)
    expect_columns("x", x, n)
    expect_factors(B, A, m, n, weight.device)
    if bias is not None:
        expect("bias", bias, (m,), None, weight.device)
    if dropped is not None:
        expect_columns("dropped", dropped, n)
    owner = integer("owner", owner, 0, MAX_LAYERS)
    scaling = number("scaling", scaling)
    x, bias, dtype = cast_inputs(x, bias, weight.dtype)
    branch_dtype = autocast_dtype(x.device.type, A.dtype)
    if dropped is not None and branch_dtype.itemsize < dropped.dtype.itemsize:
        dropped = dropped.to(branch_dtype)  # before the autograd function, which would save the wider copy
    norms, key, settings, compute_norms = None, None, None, False
    if noise is not None:
        if not isinstance(noise, RowNoise):
            raise TypeError(f"noise must be a RowNoise or None, got {type(noise).__name__}")
        norms, key = noise.norms, noise.key
        expect("norms", norms, (m,), None, weight.device)
        compute_norms = boolean("compute_norms", noise.compute_norms)
        settings = NoiseSettings(noise.layer, dtype, backend, noise.relative)
    options = _Options(scaling, branch_dtype, settings, compute_norms, owner)
    return apply(_LoraLinear, x, dropped, weight, bias, A, B, norms, key, options)


class _LoraLinear(Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        norms: Tensor | None,
        key: Tensor | None,
        options: _Options,
    ) -> Tensor:
        source, dtype = x if dropped is None else dropped, options.branch_dtype
        hidden = F.linear(source.to(dtype), A.to(dtype))  # (..., r)
        if options.noise is None:
            out = owned(F.linear(x, weight.to(x.dtype), bias))
        else:
            factors = (B, A, options.scaling) if options.compute_norms else None
            out = linear_forward(x, weight, bias, cast(Tensor, norms), cast(Tensor, key), options.noise, factors)
        out = _add_product(out, hidden * options.scaling, B.to(dtype).T)
        _, _, need_weight, _, need_A, need_B = ctx.needs_input_grad[:6]
        ctx.save_for_backward(
            x if need_weight else None,
            source if need_A or need_B else None,
            hidden if need_B else None,
            weight, A, B, norms, key,
        )  # fmt: skip
        ctx.has_dropout, ctx.options = dropped is not None, options
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        options: _Options = ctx.options
        backward_began(options.owner)
        x, source, hidden, weight, A, B, norms, key = ctx.saved_tensors
        need_x, need_dropped, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        dtype, twice = options.branch_dtype, torch.is_grad_enabled()  # twice: this backward is itself differentiated
        grad_branch = grad.to(dtype)
        grad_hidden = (grad_branch @ B.to(dtype)) * options.scaling  # (..., r): dL/d(x_d A^T)
        grad_x = grad_dropped = grad_A = grad_B = None
        if need_A:
            grad_A = (_rows(grad_hidden).T @ _rows(source.to(dtype))).to(A.dtype)
        if need_B:
            hidden = F.linear(source.to(dtype), A.to(dtype)) if twice else hidden  # the saved one has no gradient
            grad_B = (_rows(grad_branch).T @ _rows(hidden * options.scaling)).to(B.dtype)
        del grad_branch
        if need_x:
            if options.noise is None:
                grad_x = grad @ weight.to(grad.dtype)
            else:
                grad_x = linear_grad_x(grad, weight, norms, key, options.noise)
            if not ctx.has_dropout:
                grad_x = _add_product(grad_x, grad_hidden, A.to(dtype), in_place=not twice)
        if need_dropped:
            grad_dropped = grad_hidden @ A.to(dtype)
        grad_weight = linear_grad_weight(grad, x, weight) if need_weight else None
        grad_bias = linear_grad_bias(grad) if need_bias else None
        return grad_x, grad_dropped, grad_weight, grad_bias, grad_A, grad_B, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _add_product(out: Tensor, left: Tensor, right: Tensor, in_place: bool = True) -> Tensor:
    """``out + left @ right``, summed in the wider dtype of the two and rounded to the dtype of `out`."""
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
