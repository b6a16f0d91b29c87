"""W + eps as a tensor: inside of a transform of torch.func (grad, vmap, jvp, ...), in forward-mode AD, in a trace.

Autograd nodes and kernels of our own cannot be used there: tensors are wrappers without memory, and what is not an
operator is not seen. So eps is made as a whole, by an operator, and torch does the rest: the m x n numbers of W + eps
are kept for the backward, and the row norms are those of W + sBA itself, batched where the factors are. The noise is
that of a pass outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from .method import FlatLora
from .ops.blocks import is_watched
from .ops.norms import norm_dtype, vector_norms
from .ops.perturb import perturb_weight
from .spread import moved_weight, replaced_forward

TRACES = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)


@torch.library.custom_op("flatlora::normals", mutates_args=())
def normals(like: Tensor, rows: int, columns: int, seed: int, sample: int, layer: int, backend: str) -> Tensor:
    """z of `perturb_weight`, (rows, columns), of the dtype and on the device of `like`."""
    key = torch.tensor([seed, sample], device=like.device)
    return perturb_weight(like.new_zeros(rows, columns), like.new_ones(rows), key, layer, backend=backend)


@normals.register_fake
def _(like, rows, columns, seed, sample, layer, backend):
    return like.new_empty(rows, columns)


def is_transformed() -> bool:
    """Does this forward run inside of a transform or of a trace (TensorBoard's `add_graph`, make_fx, fake tensors)?"""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing():
        return True
    return is_watched() and any(torch._C._get_dispatch_mode(mode) is not None for mode in TRACES)


def transformed_forward(layer: Any, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A perturbed forward of a flat layer there; `plain` is peft's own.

    Raises:
        RuntimeError: the layer, or the method, is not perturbed inside of a transform.
    """
    base, method = layer.get_base_layer(), layer.perturbation.settings.method
    known = isinstance(base, (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    known = known and getattr(base, "groups", 1) == 1 and not layer.lora_variant and base.weight.is_floating_point()
    known = known and not layer._base_has_changed(base)
    if not known or not method.transforms:
        raise RuntimeError(
            f"{type(method).__name__} cannot perturb a {type(layer).__name__} over {type(base).__name__} inside of a "
            "transform of torch.func, in forward-mode AD or in a trace. There it can be done with FlatLoraConfig, for "
            "linear, convolution (groups=1) and embedding layers without a variant such as DoRA. Use loss.backward(), "
            "or call the model inside `with flatlora.unperturbed(model):`."
        )
    if isinstance(method, FlatLora):
        out = _with_dense_noise(layer, plain, x, *args, **kwargs)
    else:
        out = method.forward(layer, plain, x, *args, **kwargs)
    layer.on_backward()  # no hook will run
    return out


def _with_dense_noise(layer: Any, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """peft's forward with W + eps for the base layer's weight, as its hooks and parametrizations have made it."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):  # some have a forward of their own, which scales
        with moved_weight(base, _dense_noise(layer, base)):
            return plain(x, *args, **kwargs)
    with replaced_forward(base, lambda x: _base_product(base, x, base.weight + _dense_noise(layer, base))):
        return plain(x, *args, **kwargs)


def _dense_noise(layer: Any, base: Any) -> Tensor:
    """eps, of the shape of the weight."""
    state = layer.perturbation
    seed, sample = state.drawn()
    rows = base.weight.T if isinstance(base, Conv1D) else base.weight.flatten(1)
    (m, n), dtype = rows.shape, norm_dtype(rows.dtype)
    with torch.no_grad():
        merged = rows.to(dtype)
        for name in layer._active():
            merged = merged + layer.scaling[name] * _product(layer, name).to(dtype)
        row_norms = vector_norms(merged, dtype)
        row_std = state.settings.method.noise_norms(row_norms) * (layer._strength() * state.ramp / math.sqrt(n))
        like = torch.empty(0, dtype=dtype, device=rows.device)
        z = torch.ops.flatlora.normals(like, m, n, seed, sample, layer.stream, state.settings.backend)
        eps = row_std[:, None] * z
    eps = eps.T if isinstance(base, Conv1D) else eps.view(base.weight.shape)
    return eps.to(base.weight)


def _base_product(base: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The base layer's forward with another weight."""
    if isinstance(base, Conv1D):
        return F.linear(x, weight.T, base.bias)
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, base.bias)
    return base._conv_forward(x, weight, base.bias)


def _product(layer: Any, name: str) -> Tensor:
    """B A, (m, n)."""
    if name in layer.lora_embedding_A:
        return (layer.lora_embedding_B[name] @ layer.lora_embedding_A[name]).T
    A, B = layer._dense_factors(name)
    return B @ A
