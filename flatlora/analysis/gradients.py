"""Gradients and Hessian-vector products with respect to the merged weights, trainable or frozen.

A detached view replaces each chosen weight (`displaced`), and gradients are taken with respect to these views: no
`.grad` and no `requires_grad` of the model changes. Inference mode is left meanwhile, since no gradient exists in it;
torch refuses batches made in it. Memory: the autograd graph of one batch, as in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..utils.dtypes import accumulation_dtype
from .displacement import Weight, displaced
from .mean_loss import MeanLoss, evaluation_mode


class WeightVector:
    """The chosen weights as one vector, row by row, tied weights once.

    Attributes:
        size: N, the number of entries.
        dtype: float64 if a weight is float64, else float32.
        device: that of the first weight.
        unique: the weights without tied copies, by index in the noise stream.
    """

    def __init__(self, loss: MeanLoss) -> None:
        self.loss = loss
        self.unique: dict[int, Weight] = {}
        for weight in loss.weights:
            self.unique.setdefault(weight.index, weight)
        values = [weight.values() for weight in self.unique.values()]
        self.size = sum(v.numel() for v in values)
        dtypes = [accumulation_dtype(v.dtype) for v in values]
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.device = values[0].device

    def split(self, vector: Tensor) -> dict[int, Tensor]:
        """Views of a vector (N,) with the (m, n) shapes of the weights, by index in the noise stream."""
        shapes = [weight.shape for weight in self.unique.values()]
        parts = torch.split(vector, [m * n for m, n in shapes])
        return {i: part.view(shape) for i, part, shape in zip(self.unique, parts, shapes, strict=True)}

    def join(self, parts: list[Tensor]) -> Tensor:
        """Concatenate gradients, (m, n) each, to a vector (N,)."""
        return torch.cat([part.reshape(-1).to(self.device, self.dtype) for part in parts])

    @contextmanager
    def leaves(self, offset: Tensor | None = None) -> Iterator[list[Tensor]]:
        """Evaluate the model at W' + offset; the loss can be differentiated with respect to the yielded leaves."""
        shift = self.split(offset) if offset is not None else {}
        leaves = {}
        for index, weight in self.unique.items():
            values = weight.values()
            moved = values + shift[index].to(values.device, values.dtype) if index in shift else values
            leaves[index] = moved.detach().requires_grad_()
        with (
            evaluation_mode(self.loss.model),
            displaced(self.loss.weights, lambda weight, values: leaves[weight.index]),
            sdpa_kernel(SDPBackend.MATH),  # the fused attention kernels have no second derivative
            torch.enable_grad(),
        ):
            yield list(leaves.values())

    @torch.inference_mode(False)
    def value(self, batches: list[tuple[float, Any]], offset: Tensor) -> float:
        """The mean loss of (share, batch) pairs at W' + offset."""
        with self.leaves(offset), torch.no_grad():
            return float(sum(share * self.loss.loss(batch).item() for share, batch in batches))

    @torch.inference_mode(False)
    def gradient(self, batches: list[tuple[float, Any]], offset: Tensor | None = None) -> tuple[float, Tensor]:
        """The mean loss of (share, batch) pairs at W' + offset and its gradient, (N,)."""
        total, gradient = 0.0, torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for share, batch in batches:
            with self.leaves(offset) as leaves:
                loss = self.loss.loss(batch)
                if loss.requires_grad:
                    gradient += share * self.join(_grad(loss, leaves))
            total += share * loss.item()
        return total, gradient

    @torch.inference_mode(False)
    def product(self, vector: Tensor) -> Tensor:
        """The product H v, (N,), with the Hessian H of the mean loss over all batches."""
        vector = vector.clone() if vector.is_inference() else vector  # which cannot be in a graph
        out = torch.zeros_like(vector)
        parts = self.split(vector)
        for share, batch in zip(self.loss.shares, self.loss.batches, strict=True):
            with self.leaves() as leaves:
                loss = self.loss.loss(batch)
                if not loss.requires_grad:
                    continue
                slopes = _grad(loss, leaves, create_graph=True)
                pairs = [(g, parts[i]) for i, g in zip(self.unique, slopes, strict=True) if g.requires_grad]
                if pairs:
                    gradients, vectors = zip(*[(g, v.to(g.device, g.dtype)) for g, v in pairs], strict=True)
                    out += share * self.join(_grad(gradients, leaves, grad_outputs=vectors))
        return out


def _grad(outputs: Any, leaves: list[Tensor], **kwargs: Any) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, leaves, allow_unused=True, materialize_grads=True, **kwargs))
