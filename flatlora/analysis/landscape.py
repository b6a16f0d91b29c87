"""Loss along random directions around a solution, after Li et al. 2018 (arXiv 1712.09913)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..utils.arguments import check_fields, integer
from .fields import how, points, same_length, samples
from .mean_loss import LossFn
from .measurement import Measurement
from .options import OptionKeywords, Options, grid, measures
from .stats import Curve, Estimate

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, eq=False)
class LossLine(Curve):
    """Loss along several random directions; mean, stderr and interval are over the directions.

    Attributes:
        distances: t, in units of the row norms.
        losses: L(W' + t D_k) for each direction k.
        center: L(W').
        noise, space, seed: kind of the directions. Lines with the same three can be compared point by point.
    """

    GRID, SAMPLES = "distances", "losses"
    distances: Tensor = points()  # (points,), float64
    losses: Tensor = samples()  # (directions, points), float64
    center: float = how("number")
    noise: str = how("noise")
    space: str = how("space")
    seed: int = how("seed")

    def rise(self) -> LossLine:
        """The line relative to its center, L(W' + t D) - L(W')."""
        return replace(self, losses=self.losses - self.center, center=0.0)

    def curvature(self) -> Estimate:
        """Mean of d^T H d over the directions, from a least-squares parabola a t^2 / 2 through the rises.

        The estimate is meaningful where the line is close to a parabola, so measure it at small distances.

        Raises:
            ValueError: all distances are 0.
        """
        squares = self.distances.square() / 2
        if not squares.any():
            raise ValueError("distances must hold one other than 0")
        return Estimate.of((self.losses - self.center) @ squares / squares.square().sum())


@measures
def loss_line(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    distances: Sequence[float] | Tensor | None = None,
    directions: int = 3,
    noise: str = "filter_normalized",
    **options: Unpack[OptionKeywords],
) -> LossLine:
    """The loss L(W' + t D_k) at each distance t along random directions D_1 ... D_directions.

    The model is evaluated in evaluation mode and only read: no weight is written, and training mode, gradients and
    random states are restored, also after an exception. A direction is stored as a seed, and one displaced weight
    exists at a time. Cost: directions * distances + 1 passes over the batches.

    Args:
        model: any module, with or without adapters.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch, a scalar tensor.
        batches: iterated once and kept as a list.
        distances: t, in units of the row norms (see `noise`); default: 21 points from -1 to 1.
        directions: number of random directions; the spread over them is the uncertainty of the line.
        noise: "filter_normalized" (||D_i|| = ||W'_i||, Li et al.), "filter" (Flat-LoRA), "layer" or "plain"; see
            `flatlora.analysis.directions`.
        options: `seed`, `space`, `layers`, `norms`, `sizes`, `progress` and `file`, see
            `flatlora.analysis.options.Options`.

    Raises:
        ValueError: an argument out of bounds; the message has its name, bound and value.

    Example:
        >>> line = loss_line(model, lambda model, batch: model(**batch).loss, batches)
        >>> plot_loss_line({"Flat-LoRA": line}).savefig("line.png")
    """
    shared = Options.of(loss_line, options)
    found = grid("distances", torch.arange(-10, 11).double() / 10 if distances is None else distances)
    directions = integer("directions", directions, 1)
    measured = Measurement("line", model, loss_fn, batches, noise, shared)
    losses = measured.along(found.tolist(), directions, "loss line")
    return LossLine(found, losses, measured.center, *measured.how)


@dataclass(frozen=True, eq=False)
class LossSurface:
    """Loss over the plane of two random directions.

    Attributes:
        x, y: distances along the first and the second direction, in units of the row norms.
        losses: L(W' + x D_0 + y D_1).
        center: L(W').
        noise, space, seed: kind of the directions. Surfaces with the same three can be compared point by point.
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
        """The surface relative to its center."""
        return replace(self, losses=self.losses - self.center, center=0.0)


@measures
def loss_surface(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    x: Sequence[float] | Tensor | None = None,
    y: Sequence[float] | Tensor | None = None,
    noise: str = "filter_normalized",
    **options: Unpack[OptionKeywords],
) -> LossSurface:
    """The loss L(W' + x D_0 + y D_1) over a grid; D_0 and D_1 are the first two directions of `loss_line`.

    A plane is a single sample of all planes and has no confidence interval: repeat it with another seed, or use
    `loss_line` to support a claimed difference.

    Args:
        model, loss_fn, batches, noise, options: see `loss_line`.
        x, y: distances, in units of the row norms; default: 15 points each from -1 to 1.

    Raises:
        ValueError: an argument out of bounds.
    """
    shared = Options.of(loss_surface, options)
    default = torch.arange(-7, 8).double() / 7
    columns, rows = (grid(name, default if values is None else values) for name, values in (("x", x), ("y", y)))
    measured = Measurement("surface", model, loss_fn, batches, noise, shared)
    losses = measured.plane(rows.tolist(), columns.tolist(), "loss surface")
    return LossSurface(columns, rows, losses, measured.center, *measured.how)
