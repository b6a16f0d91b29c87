"""A linear layer with its adapters as one autograd function.

    y      = x (W + eps)^T + b + sum_k s_k (x_k A_k^T) B_k^T      x_k: x after the dropout of adapter k, or x itself
    dL/dx  = dL/dy (W + eps) [+ dL/dx_k if x_k is x]              dL/dx_k = s_k (dL/dy B_k) A_k
    dL/dB_k = s_k dL/dy^T (x_k A_k^T)                             dL/dA_k = s_k (dL/dy B_k)^T x_k

Compared with a base product followed by two small modules, it moves less memory: s is applied to the r columns between
A and B, the low-rank branch is added in place, and x is saved as given, not as a copy in the precision of A. This saves
more time than the noise costs. For eps and for what autograd saves, see `products`. DoRA: see `fused_dora`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..utils.arguments import boolean
from .autograd import Context, Gradients, apply
from .checks import MAX_LAYERS, Matrix, expect, expect_columns, expect_factors, floating_dtype, integer, matrix, number
from .low_rank import Dropout, add_low_rank, dropout_of, gather, is_wide, project, reads, rows
from .norms import no_autocast
from .perturb import ScaledFactors
from .products import (
    NoiseSettings,
    as_tensor_if_small,
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
    relative: float | Tensor
    key: Tensor
    layer: int
    compute_norms: bool


class RowNoise(_RowNoise):
    """Noise relative to the norm of each row: ``eps_ij = relative * norms_i * z(key, layer, i, j)``.

    Attributes:
        norms: (m,) float32, or float64 for a float64 weight.
        relative: ratio of standard deviation to row norm, see `perturb_weight`.
        key, layer: see `perturbed_linear`.
        compute_norms: first write the row norms of W + s B A into `norms`; only if `makes_norms` returns True. Its
            former name `stale` is accepted as a keyword and as an attribute.
    """

    __slots__ = ()

    def __new__(
        cls,
        norms: Tensor,
        relative: float | Tensor,
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


class Branch(NamedTuple):
    """One adapter of a linear layer, ``s (x_d A^T) B^T``.

    Attributes:
        A, B: (r, n) and (m, r), of one dtype.
        scaling: s.
        dropped: x_d, (..., n) of A's dtype: x after dropout; or this dropout, which is then applied to x in the
            products and takes a byte per element; or None if x_d is x.
    """

    A: Tensor
    B: Tensor
    scaling: float
    dropped: Tensor | Dropout | None = None


class _Options(NamedTuple):
    scalings: tuple[float, ...]  # s of each branch
    keeps: tuple[float | None, ...]  # of each branch: factor of dropout, if its third operand is the mask
    dtypes: tuple[torch.dtype, ...]  # of each branch
    matrix: Matrix | None  # a weight in another form than a tensor
    dtype: torch.dtype | None  # of the base product with such a weight
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
    dropped: Tensor | Dropout | None = None,  # (..., n)
    backend: str = "auto",
    owner: int = 0,
) -> Tensor:
    """``x (W + eps)^T + b + s (x_d A^T) B^T``: `adapted_linear` with one adapter.

    Args:
        x, weight, bias, noise, backend, owner: see `adapted_linear`.
        A, B, scaling, dropped: see `Branch`.

    Returns:
        (..., m) of the dtype of the base product.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    return adapted_linear(x, weight, bias, [Branch(A, B, scaling, dropped)], noise, backend=backend, owner=owner)


def adapted_linear(
    x: Tensor,  # (..., n)
    weight: Matrix,  # (m, n)
    bias: Tensor | None,  # (m,)
    branches: Sequence[Branch],
    noise: RowNoise | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    owner: int = 0,
) -> Tensor:
    """``x (W + eps)^T + b + sum_k s_k (x_k A_k^T) B_k^T``; eps = 0 without `noise`.

    The base product has the weight's dtype, and the low-rank branch that of A; under autocast both have the autocast
    dtype. They are added in the wider of the two dtypes, and the sum is rounded once for each adapter.

    A weight in another form (quantized) is rebuilt a block of rows at a time, in the forward and again in the backward.
    Its product has the dtype `dtype`, also under autocast, and is rounded to that of x.

    Args:
        x: (..., n) of the weight's dtype (any floating-point dtype under autocast, or with a weight in another form).
        weight: (m, n); see `perturbed_linear` for a tensor, `rebuilt_linear` for another form.
        bias, backend, owner: see `perturbed_linear`. With a weight in another form, a bias of dtype `dtype`.
        branches: the adapters.
        noise: eps, or None for none.
        dtype: of the product with a weight in another form; default: that of x.

    Returns:
        (..., m) of the dtype of the base product; of the dtype of x for a weight in another form.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    tensor, device = check_base(x, weight, bias, dtype)
    m, n = weight.shape
    branches = [checked_branch(branch, x, m, n, device) for branch in branches]
    owner = integer("owner", owner, 0, MAX_LAYERS)
    if tensor is None:
        dtype = product_dtype = dtype or x.dtype
    else:
        x, bias, product_dtype = cast_inputs(x, bias, tensor.dtype)
        dtype = None
    norms, key, settings, compute_norms = None, None, None, False
    if noise is not None:
        if not isinstance(noise, RowNoise):
            raise TypeError(f"noise must be a RowNoise or None, got {type(noise).__name__}")
        norms, key = noise.norms, noise.key
        expect("norms", norms, (m,), None, device)
        compute_norms = boolean("compute_norms", noise.compute_norms)
        settings = NoiseSettings(noise.layer, product_dtype, backend, noise.relative)
    dtypes = tuple(autocast_dtype(x.device.type, branch.A.dtype) for branch in branches)
    scalings = tuple(branch.scaling for branch in branches)
    dropouts = [branch.dropped for branch in branches]
    keeps, whole = tuple(_keep(dropped) for dropped in dropouts), weight if tensor is None else None
    options = _Options(scalings, keeps, dtypes, whole, dtype, settings, compute_norms, owner)
    operands = [operand for branch in branches for operand in (branch.A, branch.B, _tensor(branch.dropped))]
    return apply(_AdaptedLinear, x, tensor, bias, norms, key, options, *operands)


def masked_branch(branch: Branch, x: Tensor, p: float) -> Branch | None:
    """The branch with a dropout of x that the kernel applies; None where it does not, and nothing has been drawn."""
    dropout = dropout_of(x, p, branch.A, branch.B, autocast_dtype(x.device.type, branch.A.dtype))
    return None if dropout is None else branch._replace(dropped=dropout)


def check_base(
    x: Tensor, weight: Matrix, bias: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor | None, torch.device]:
    """Check the base layer's operands. Returns the weight, or None if it is in another form, and its device."""
    m, n = matrix("weight", weight)
    tensor = weight if isinstance(weight, Tensor) else None
    device = x.device if tensor is None else tensor.device
    expect_columns("x", x, n)
    if bias is not None:
        expect("bias", bias, (m,), None, device)
    floating_dtype("dtype", dtype)
    return tensor, device


def checked_branch(branch: Branch, x: Tensor, m: int, n: int, device: torch.device) -> Branch:
    """A branch whose operands fit, with x_d not wider than the branch."""
    A, B, scaling, dropped = branch
    expect_factors(B, A, m, n, device)
    if isinstance(dropped, Dropout):
        expect("mask", dropped.mask, x.shape, frozenset({torch.bool}), device)
        dropped = Dropout(dropped.mask, number("keep", dropped.keep))
    elif dropped is not None:
        expect_columns("dropped", dropped, n)
        dtype = autocast_dtype(device.type, A.dtype)
        if dtype.itemsize < dropped.dtype.itemsize:
            dropped = dropped.to(dtype)  # before the autograd function, which would save the wider copy
    return Branch(A, B, number("scaling", scaling), dropped)


class _AdaptedLinear(Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norms: Tensor | None,
        key: Tensor | None,
        options: _Options,
        *operands: Tensor | None,  # A, B, and x_d or a mask, of each branch
    ) -> Tensor:
        branches = _branches(operands, options)
        sources = [branch.dropped if isinstance(branch.dropped, Tensor) else x for branch in branches]
        dropouts = [branch.dropped if isinstance(branch.dropped, Dropout) else None for branch in branches]
        hidden = [  # (..., r) each
            project(source, branch.A, dtype, is_wide(branch.A, branch.B), dropout)
            for source, branch, dtype, dropout in zip(sources, branches, options.dtypes, dropouts, strict=True)
        ]
        out = _base_product(x, weight, bias, norms, key, options, branches)
        for inner, branch, dtype in zip(hidden, branches, options.dtypes, strict=True):
            out = add_low_rank(out, inner * branch.scaling, branch.B.to(dtype).T)
        need = ctx.needs_input_grad
        saved: list[Tensor | None] = [x if need[1] else None, weight, norms, key]
        for k, (branch, dropout) in enumerate(zip(branches, dropouts, strict=True)):
            need_A, need_B = need[6 + 3 * k], need[7 + 3 * k]
            saved += [sources[k] if need_A or need_B else None, hidden[k] if need_B else None]
            saved += [branch.A, branch.B, None if dropout is None else dropout.mask]
        ctx.save_for_backward(*saved)
        ctx.own_input, ctx.options, ctx.dtype = [source is not x for source in sources], options, x.dtype
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        options: _Options = ctx.options
        backward_began(options.owner)
        x, weight, norms, key, *saved = ctx.saved_tensors
        need = ctx.needs_input_grad
        found: list[Tensor | None] = []
        through_x = []  # (dL/d(x_k A_k^T), A_k, dropout) of the branches whose input is x, or is made of it here
        for k, (scaling, dtype) in enumerate(zip(options.scalings, options.dtypes, strict=True)):
            source, hidden, A, B, mask = saved[5 * k : 5 * k + 5]
            need_A, need_B, need_dropped = need[6 + 3 * k : 9 + 3 * k]
            dropout = _dropout(mask, options.keeps[k])
            grad_hidden, grad_A, grad_B = branch_gradients(
                grad, source, hidden, A, B, scaling, dtype, (need_A, need_B), dropout
            )
            found += [grad_A, grad_B, grad_hidden @ A.to(dtype) if need_dropped else None]
            if not ctx.own_input[k]:
                through_x.append((grad_hidden, A.to(dtype), dropout))
        grad_x = None
        if need[0]:
            grad_x = _base_gradient(grad, weight, norms, key, options, ctx.dtype)
            for grad_hidden, A, dropout in through_x:
                grad_x = add_low_rank(grad_x, grad_hidden, A, not torch.is_grad_enabled(), dropout)
        grad_weight = linear_grad_weight(grad, x, weight) if need[1] else None
        grad_bias = linear_grad_bias(grad if options.dtype is None else grad.to(options.dtype)) if need[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, *found


def branch_gradients(
    grad: Tensor,  # (..., m)
    source: Tensor | None,  # (..., n)
    hidden: Tensor | None,  # (..., r)
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    need: tuple[bool, bool],
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dL/d(x_d A^T), (..., r), and the gradients of A and B, if they are needed, of one branch of this dtype."""
    need_A, need_B = need
    wide = is_wide(A, B)
    in_kernel = wide and reads(grad, B, dtype)
    grad = grad if in_kernel else grad.to(dtype)
    grad_hidden = (project(grad, B.T, dtype, wide) if in_kernel else grad @ B.to(dtype)) * scaling
    grad_A = grad_B = None
    if need_A:
        grad_A = gather(grad_hidden, cast(Tensor, source), dtype, wide, dropout).to(A.dtype)
    if need_B:
        if torch.is_grad_enabled():  # this backward is itself differentiated, and the saved one has no gradient
            hidden = project(cast(Tensor, source), A, dtype, wide, dropout)
        hidden = cast(Tensor, hidden) * scaling
        in_rows = gather(hidden, grad, dtype, wide).T.contiguous() if in_kernel else rows(grad).T @ rows(hidden)
        grad_B = in_rows.to(B.dtype)
    return grad_hidden, grad_A, grad_B


def _keep(dropped: Tensor | Dropout | None) -> float | None:
    return dropped.keep if isinstance(dropped, Dropout) else None


def _tensor(dropped: Tensor | Dropout | None) -> Tensor | None:
    return dropped.mask if isinstance(dropped, Dropout) else dropped


def _dropout(mask: Tensor | None, keep: float | None) -> Dropout | None:
    return None if mask is None or keep is None else Dropout(mask, keep)


def _branches(operands: tuple[Tensor | None, ...], options: _Options) -> list[Branch]:
    return [
        Branch(cast(Tensor, A), cast(Tensor, B), scaling, dropped if keep is None else _dropout(dropped, keep))
        for k, (scaling, keep) in enumerate(zip(options.scalings, options.keeps, strict=True))
        for A, B, dropped in [operands[3 * k : 3 * k + 3]]
    ]


def _base_product(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norms: Tensor | None,
    key: Tensor | None,
    options: _Options,
    branches: list[Branch],
) -> Tensor:
    """``x (W + eps)^T + b``."""
    if weight is not None:
        if options.noise is None:
            return owned(F.linear(x, weight.to(x.dtype), bias))
        return linear_forward(
            x, weight, bias, cast(Tensor, norms), cast(Tensor, key), options.noise, _merged(branches, options)
        )
    whole, dtype = cast(Matrix, options.matrix), cast(torch.dtype, options.dtype)
    with no_autocast(x.device.type):
        if options.noise is None:
            return owned(F.linear(x.to(dtype), whole[: len(whole)].to(dtype), bias)).to(x.dtype)
        whole = as_tensor_if_small(whole, dtype)
        factors = _merged(branches, options)
        return linear_forward(
            x.to(dtype), whole, bias, cast(Tensor, norms), cast(Tensor, key), options.noise, factors
        ).to(x.dtype)


def _base_gradient(
    grad: Tensor, weight: Tensor | None, norms: Tensor | None, key: Tensor | None, options: _Options, dtype: torch.dtype
) -> Tensor:
    """``dL/dy (W + eps)``, of the dtype of x."""
    if weight is not None:
        if options.noise is None:
            return grad @ weight.to(grad.dtype)
        return linear_grad_x(grad, weight, cast(Tensor, norms), cast(Tensor, key), options.noise)
    whole, grad = cast(Matrix, options.matrix), grad.to(options.dtype)
    if options.noise is None:
        return (grad @ whole[: len(whole)].to(grad.dtype)).to(dtype)
    whole = as_tensor_if_small(whole, grad.dtype)
    return linear_grad_x(grad, whole, cast(Tensor, norms), cast(Tensor, key), options.noise).to(dtype)


def _merged(branches: list[Branch], options: _Options) -> ScaledFactors | None:
    """The factors of the sum of all adapters, if the kernel shall compute the row norms of the merged weight."""
    if not options.compute_norms:
        return None
    if len(branches) == 1:
        return branches[0].B, branches[0].A, branches[0].scaling
    B = torch.cat([branch.B.float() * branch.scaling for branch in branches], dim=1)
    return B, torch.cat([branch.A.float() for branch in branches]), 1.0
