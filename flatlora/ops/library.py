"""The perturbed linear product as a registered torch operator, for `torch.compile`.

    flatlora::perturbed_linear(x, W, b, row_std, key, ...) -> y       y = x (W + eps)^T + b
    flatlora::perturbed_linear_grad_x(dy, W, row_std, key, ...) -> dx    dx = dy (W + eps)

Opaque to the compiler, so that the noise is made by the same kernels as in eager mode and has the same bits. The
gradient of each is the other, to any order.
"""

from __future__ import annotations

import weakref
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from .products import linear_forward, linear_grad_bias, linear_grad_weight, linear_grad_x


class Observer(Protocol):
    """Told when the backward of a compiled product runs: compiled code has no room for hooks on tensors."""

    def backward_began(self) -> None: ...


# by number. Compiled code has it in `address`, (number of the layer, its stream, number of the observer): a tensor on
# the CPU, so that equal layers share one compiled graph
OBSERVERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


@torch.library.custom_op("flatlora::perturbed_linear", mutates_args=())
def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045  (the schema is read from the annotation)
    row_std: Tensor,
    key: Tensor,
    address: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return linear_forward(x, weight, bias, row_std, key, int(address[1]), dtype, backend)


@torch.library.custom_op("flatlora::perturbed_linear_grad_x", mutates_args=())
def perturbed_linear_grad_x(
    grad: Tensor,
    weight: Tensor,
    row_std: Tensor,
    key: Tensor,
    address: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    observer = OBSERVERS.get(int(address[2]))
    if observer is not None:
        observer.backward_began()
    return linear_grad_x(grad, weight, row_std, key, int(address[1]), dtype, backend)


@perturbed_linear.register_fake
def _(x, weight, bias, row_std, key, address, dtype, backend):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@perturbed_linear_grad_x.register_fake
def _(grad, weight, row_std, key, address, dtype, backend):
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _bias, row_std, key, address, *ctx.settings = inputs
    ctx.save_for_backward(weight, row_std, key, address, x if ctx.needs_input_grad[1] else None)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    weight, row_std, key, address, x = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_x = perturbed_linear_grad_x(grad, weight, row_std, key, address, *ctx.settings) if need_x else None
    grad_weight = linear_grad_weight(grad, x, weight) if need_weight else None
    grad_bias = linear_grad_bias(grad) if need_bias else None
    return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _setup_grad(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, weight, row_std, key, address, *ctx.settings = inputs
    ctx.save_for_backward(weight, row_std, key, address, grad if ctx.needs_input_grad[1] else None)


def _backward_grad(ctx: Any, second: Tensor) -> tuple:
    weight, row_std, key, address, grad = ctx.saved_tensors
    need_grad, need_weight = ctx.needs_input_grad[:2]
    grad_grad = perturbed_linear(second, weight, None, row_std, key, address, *ctx.settings) if need_grad else None
    grad_weight = linear_grad_weight(grad, second, weight) if need_weight else None
    return grad_grad, grad_weight, None, None, None, None, None


perturbed_linear.register_autograd(_backward, setup_context=_setup)
perturbed_linear_grad_x.register_autograd(_backward_grad, setup_context=_setup_grad)
