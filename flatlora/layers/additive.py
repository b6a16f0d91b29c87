"""Add x eps^T to peft's output, where the base layer's product must stay its own.

DoRA rescales the base product, so the gradient of its magnitudes would contain the noise if eps were in that product;
`ops.fused_dora` computes both products for the layers that it takes.
A base layer that was changed (QAT, float8, quantization) computes a product that this library does not know.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..ops import perturbed_linear, row_noise
from ..ops.norms import norm_dtype, vector_norms
from .base_product import product
from .supported import CONVOLUTIONS

if TYPE_CHECKING:
    from .flat_layer import FlatLayer


def add_noise(layer: FlatLayer, out: Tensor, x: Tensor, *, dtype_of: Tensor) -> Tensor:
    """``out + x eps^T``, with eps rounded to the dtype of `dtype_of`."""
    base: Any = layer.get_base_layer()
    if isinstance(base, CONVOLUTIONS):
        shape: tuple[int, ...] = tuple(base.weight.shape)
    else:
        shape = (layer.in_features, layer.out_features)[:: 1 if isinstance(base, Conv1D) else -1]
    return out + product(layer, x, _zeros(shape, dtype_of), None, *layer.noise())


def add_linear_noise(layer: FlatLayer, out: Tensor, x: Tensor) -> Tensor:
    """The same for a linear layer with any base layer, in the dtype of x."""
    zeros = _zeros((layer.out_features, layer.in_features), x)
    backend = layer.perturbation.settings.backend
    return out + perturbed_linear(x, zeros, None, *layer.noise(), layer.stream, backend=backend).to(out.dtype)


def add_row_noise(layer: FlatLayer, out: Tensor, tokens: Tensor) -> Tensor:
    """Add the rows of eps that an embedding looks up.

    The output of an embedding is the merged row, so its norm is the row norm, with DoRA and scales.
    """
    n, backend = out.shape[-1], layer.perturbation.settings.backend
    key, _ = layer.perturbation.draw(out.device)
    rho_t = layer.rho() * layer.perturbation.ramp
    merged = out.detach().flatten(0, -2)
    row_std = vector_norms(merged, norm_dtype(out.dtype)) * (rho_t / math.sqrt(n))
    noise = row_noise(tokens.flatten(), row_std, key, layer.stream, n, dtype=out.dtype, backend=backend)
    return out + noise.view_as(out)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """W = 0 without its memory, so that W + eps is eps."""
    return torch.zeros(1, dtype=like.dtype, device=like.device).expand(shape)
