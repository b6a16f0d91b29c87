"""Gradients and Hessian products with respect to the merged weights, which need not be trainable.

A detached view of each chosen weight stands in for it (`displaced`), so gradients flow into that view and never into
the model: no `.grad` is touched, no `requires_grad` changed. What is held is the graph of one batch, as in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .evaluate import MeanLoss, measuring
from .weights import Weight, displaced


class Variables:
    """The chosen weights as one vector of float32 (float64 where a weight is): tied weights once, row by row.

    Attributes:
        size: N, the number of entries.
    """

    def __init__(self, loss: MeanLoss) -> None:
        self.loss = loss
        self.unique: dict[int, Weight] = {}
        for weight in loss.weights:
            self.unique.setdefault(weight.index, weight)
        values = [weight.values() for weight in self.unique.values()]
        self.size = sum(v.numel() for v in values)
        self.dtype = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
        self.device = values[0].device

    def split(self, vector: Tensor) -> dict[int, Tensor]:
        """A vector (N,) as views of the weights' row forms, by index in the noise stream."""
        shapes = [weight.shape for weight in self.unique.values()]
        parts = vector.split([m * n for m, n in shapes])
        return {i: part.view(shape) for i, part, shape in zip(self.unique, parts, shapes, strict=True)}

    def join(self, parts: list[Tensor]) -> Tensor:
        """The vector (N,) of gradients in row form."""
        return torch.cat([part.reshape(-1).to(self.device, self.dtype) for part in parts])

    @contextmanager
    def leaves(self, offset: Tensor | None = None) -> Iterator[list[Tensor]]:
        """Inside, the model acts with W' + offset, and the loss can be differentiated by the yielded leaves."""
        shift = self.split(offset) if offset is not None else {}
        leaves = {}
        for index, weight in self.unique.items():
            values = weight.values()
            moved = values + shift[index].to(values.device, values.dtype) if index in shift else values
            leaves[index] = moved.detach().requires_grad_()
        with (
            measuring(self.loss.model),
            displaced(self.loss.weights, lambda weight, values: leaves[weight.index]),
            sdpa_kernel(SDPBackend.MATH),  # the fused attention kernels have no second derivative
            torch.enable_grad(),
        ):
            yield list(leaves.values())

    def value(self, batches: list[tuple[float, Any]], offset: Tensor) -> float:
        """The mean loss of (share, batch) pairs at W' + offset."""
        with self.leaves(offset), torch.no_grad():
            return float(sum(share * self.loss.loss(batch).item() for share, batch in batches))

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

    def product(self, vector: Tensor) -> Tensor:
        """H v, (N,), H the Hessian of the mean loss over all batches."""
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
