"""Compute W + eps as a tensor: inside a transform of torch.func, in forward-mode AD, and in a trace.

Autograd nodes and kernels of this library cannot be used there, because tensors are wrappers without memory and only
operators are traced. So a custom operator makes the whole of eps, and torch computes the rest. The m x n numbers of
W + eps are kept for the backward, and the row norms are those of W + sBA as a tensor, batched if the factors are. The
noise is that of an ordinary pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from ..methods.base import WeightNoise
from ..ops.blocks import is_watched
from ..ops.norms import norm_dtype, vector_norms
from ..ops.perturb import perturb_weight
from .module_weights import moved_weight, replaced_forward
from .tensor_parallel import is_split
from .weights import rows_of

if TYPE_CHECKING:
    from .flat_layer import FlatLayer

TRACES = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)


@torch.library.custom_op("flatlora::normals", mutates_args=())
def normals(like: Tensor, rows: int, columns: int, seed: int, sample: int, layer: int, backend: str) -> Tensor:
    """z of `perturb_weight`, (rows, columns), with the dtype and the device of `like`."""
    key = torch.tensor([seed, sample], device=like.device)
    return perturb_weight(like.new_zeros(rows, columns), like.new_ones(rows), key, layer, backend=backend)


@normals.register_fake
def _(like: Tensor, rows: int, columns: int, seed: int, sample: int, layer: int, backend: str) -> Tensor:
    return like.new_empty(rows, columns)


def is_transformed() -> bool:
    """Whether this forward runs inside a transform or a trace (TensorBoard's `add_graph`, make_fx, fake tensors)."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch._C._is_tracing():
        return True
    return is_watched() and any(torch._C._get_dispatch_mode(mode) is not None for mode in TRACES)


def forward(layer: FlatLayer, peft_forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The perturbed forward of a layer there.

    Raises:
        RuntimeError: the layer, or the method, cannot be perturbed inside a transform.
    """
    base: Any = layer.get_base_layer()
    method = layer.perturbation.settings.method
    known = isinstance(base, (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    known = known and getattr(base, "groups", 1) == 1 and not layer.lora_variant and base.weight.is_floating_point()
    if not known or is_split(base) or layer.base_has_changed() or not method.transforms:
        raise RuntimeError(
            f"{type(method).__name__} cannot perturb a {type(layer).__name__} over {type(base).__name__} inside a "
            "transform of torch.func, in forward-mode AD or in a trace. FlatLoraConfig can, for linear, convolution "
            "(groups=1) and embedding layers without a variant such as DoRA, on whole weights. Use loss.backward(), or "
            "call the model inside `with flatlora.unperturbed(model):`."
        )
    if isinstance(method, WeightNoise):
        out = _with_dense_noise(layer, method, peft_forward, x, *args, **kwargs)
    else:
        out = layer.method_forward(peft_forward, x, *args, **kwargs)
    layer.on_backward()  # no hook will run
    return out


def _with_dense_noise(
    layer: FlatLayer, method: WeightNoise, peft_forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """peft's forward with W + eps for the base layer's weight, which hooks and parametrizations may provide."""
    base: Any = layer.get_base_layer()
    if isinstance(base, nn.Embedding):  # some have their own forward, which scales
        with moved_weight(base, _dense_noise(layer, method)):
            return peft_forward(x, *args, **kwargs)
    with replaced_forward(base, lambda x: _base_product(base, x, base.weight + _dense_noise(layer, method))):
        return peft_forward(x, *args, **kwargs)


def _dense_noise(layer: FlatLayer, method: WeightNoise) -> Tensor:
    """eps, with the shape of the weight."""
    base: Any = layer.get_base_layer()
    perturbation = layer.perturbation
    seed, sample = perturbation.records.seed(), perturbation.records.current().sample
    rows = rows_of(base)
    (m, n), dtype = rows.shape, norm_dtype(rows.dtype)
    with torch.no_grad():
        merged = rows.to(dtype)
        for name in layer.active_lora_adapters():
            merged = merged + layer.scaling[name] * _delta(layer, name).to(dtype)
        row_std = method.row_scale(vector_norms(merged, dtype)) * layer.relative_std(n, merged.device)
        like = torch.empty(0, dtype=dtype, device=rows.device)
        backend = perturbation.settings.backend
        z = torch.ops.flatlora.normals(like, m, n, seed, sample, layer.stream, backend)
        eps: Tensor = row_std[:, None] * z
    eps = eps.T if isinstance(base, Conv1D) else eps.view(base.weight.shape)
    return eps.to(base.weight)


def _base_product(base: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The base layer's forward with another weight."""
    if isinstance(base, Conv1D):
        return F.linear(x, weight.T, base.bias)
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, base.bias)
    out: Tensor = base._conv_forward(x, weight, base.bias)
    return out


def _delta(layer: FlatLayer, name: str) -> Tensor:
    """B A, (m, n)."""
    if name in layer.lora_embedding_A:
        delta: Tensor = layer.lora_embedding_B[name] @ layer.lora_embedding_A[name]
        return delta.T
    A, B = layer.weights.factors(name)
    return B @ A
