"""The loss along random directions around a solution, after Li et al. 2018 (arXiv 1712.09913)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.arguments import boolean, check_fields, integer
from .directions import Norms
from .evaluate import LossFn, bar
from .measurement import Measurement
from .norms import all_row_norms
from .options import grid, how, points, same_length, samples
from .stats import Curve, Estimate
from .weights import find_weights


@dataclass(frozen=True, eq=False)
class LossLine(Curve):
    """The loss along several random directions; mean, stderr and interval are over the directions.

    Attributes:
        distances: t.
        losses: L(W' + t D_k) for every direction k.
        center: L(W').
        noise, space, seed: what the directions are; lines with the same three can be compared point by point.
    """

    GRID, SAMPLES = "distances", "losses"
    distances: Tensor = points()  # (points,), float64
    losses: Tensor = samples()  # (directions, points), float64
    center: float = how("number")
    noise: str = how("noise")
    space: str = how("space")
    seed: int = how("seed")

    def rise(self) -> LossLine:
        """The same line measured from its centre, L(W' + t D) - L(W')."""
        return replace(self, losses=self.losses - self.center, center=0.0)

    def curvature(self) -> Estimate:
        """The mean of d^T H d over the directions, by a least-squares parabola a t^2 / 2 through the rises.

        Meaningful where the line is a parabola; ask for small distances.
        """
        squares = self.distances.square() / 2
        if not squares.any():
            raise ValueError("distances must hold one other than 0")
        return Estimate.of((self.losses - self.center) @ squares / squares.square().sum())


def loss_line(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    distances: Sequence[float] | Tensor | None = None,
    directions: int = 3,
    seed: int = 0,
    noise: str = "filter_normalised",
    space: str = "merged",
    layers: str | Callable[[str], bool] | None = None,
    norms: Norms | None = None,
    sizes: Sequence[float] | None = None,
    progress: bool | None = None,
    file: str | os.PathLike | None = None,
) -> LossLine:
    """The loss L(W' + t D_k) at every distance t along random directions D_1 ... D_directions.

    The model is only read: nothing is written into a weight, and training mode, gradients and random states are as
    they were, also after an exception. It is evaluated in evaluation mode. A direction costs a seed; one displaced
    weight exists at a time.

    Args:
        model: any module, with or without adapters.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of the batch as a scalar tensor.
        batches: run through once and kept as a list.
        distances: t, in units of the row norms (see `noise`); default 21 points from -1 to 1.
        directions: how many; the spread over them is the line's uncertainty.
        seed: of the directions. The same seed gives every model the same directions, layer name by layer name.
        noise: "filter_normalised" (||D_i|| = ||W'_i||, Li et al.), "filter" (Flat-LoRA's), "layer" or "plain".
        space: "merged" or "adapter".
        layers: None (adapted layers, or all where none is), "all", or a function of the layer's name.
        norms: row norms in place of the model's own, by layer name, from `merged_row_norms`.
        sizes: weight of each batch in the mean, its number of examples; default equal.
        progress: a progress bar; None shows one on a terminal.
        file: keep the losses here as they are measured, and go on from it if it exists.

    Raises:
        ValueError: an argument out of bounds; the message names it, its bound and its value.

    Example:
        >>> line = loss_line(model, lambda model, batch: model(**batch).loss, batches)
        >>> plot_loss_line({"Flat-LoRA": line}).savefig("line.png")
    """
    along = grid("distances", torch.arange(-10, 11).double() / 10 if distances is None else distances)
    directions = integer("directions", directions, 1)
    boolean("progress", progress, optional=True)
    loss = Measurement(
        "line", model, loss_fn, batches,
        seed=seed, noise=noise, space=space, layers=layers, norms=norms, sizes=sizes, file=file,
    )  # fmt: skip
    losses = torch.empty(directions, len(along), dtype=torch.float64)
    with bar(losses.numel(), "loss line", progress) as tick:
        for k in range(directions):
            for p, t in enumerate(along.tolist()):
                losses[k, p] = loss.at((t, k))
                tick.update()
    return LossLine(along, losses, loss.center, noise, space, seed)


def merged_row_norms(
    model: nn.Module, layers: str | Callable[[str], bool] | None = None, space: str = "merged"
) -> dict[str, Tensor]:
    """The row norms ||W'_i|| of every chosen weight, by layer name, each (m,): a shared reference for `norms=`."""
    return all_row_norms(find_weights(model, layers, space))


@dataclass(frozen=True, eq=False)
class LossSurface:
    """The loss over the plane of two random directions.

    Attributes:
        x, y: distances along the first and the second direction.
        losses: L(W' + x D_0 + y D_1).
        center: L(W').
        noise, space, seed: what the directions are; surfaces with the same three can be compared point by point.
    """

    x: Tensor = points()  # (columns,), float64
    y: Tensor = points()  # (rows,), float64
    losses: Tensor = samples()  # (rows, columns), float64
    center: float = how("number")
    noise: str = how("noise")
    space: str = how("space")
    seed: int = how("seed")

    def __post_init__(self) -> None:
        check_fields(self)
        same_length("losses", self.losses, 0, "y", len(self.y))
        same_length("losses", self.losses, 1, "x", len(self.x))

    def rise(self) -> LossSurface:
        """The same surface measured from its centre."""
        return replace(self, losses=self.losses - self.center, center=0.0)


def loss_surface(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    x: Sequence[float] | Tensor | None = None,
    y: Sequence[float] | Tensor | None = None,
    seed: int = 0,
    noise: str = "filter_normalised",
    space: str = "merged",
    layers: str | Callable[[str], bool] | None = None,
    norms: Norms | None = None,
    sizes: Sequence[float] | None = None,
    progress: bool | None = None,
    file: str | os.PathLike | None = None,
) -> LossSurface:
    """The loss L(W' + x D_0 + y D_1) over a grid; D_0 and D_1 are the first two directions of `loss_line`.

    One plane is one sample of all planes and carries no interval: look at another seed too, or use `loss_line` to
    claim a difference.

    Args:
        x, y: distances, in units of the row norms; default 15 points each from -1 to 1.
        The rest: as in `loss_line`.

    Raises:
        ValueError: an argument out of bounds.
    """
    default = torch.arange(-7, 8).double() / 7
    columns, rows = (grid(name, default if values is None else values) for name, values in (("x", x), ("y", y)))
    boolean("progress", progress, optional=True)
    loss = Measurement(
        "surface", model, loss_fn, batches,
        seed=seed, noise=noise, space=space, layers=layers, norms=norms, sizes=sizes, file=file,
    )  # fmt: skip
    losses = torch.empty(len(rows), len(columns), dtype=torch.float64)
    with bar(losses.numel(), "loss surface", progress) as tick:
        for i, b in enumerate(rows.tolist()):
            for j, a in enumerate(columns.tolist()):
                losses[i, j] = loss.at((a, 0), (b, 1))
                tick.update()
    return LossSurface(columns, rows, losses, loss.center, noise, space, seed)
