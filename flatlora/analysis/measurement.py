"""Loss of a model along random directions of its weights: what all measurements with `Options` share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .directions import Directions
from .displacement import find_weights
from .journal import Journal, fingerprint
from .mean_loss import LossFn, MeanLoss
from .merged_norms import all_row_norms
from .options import Options, check_noise
from .table import fill_table


class Measurement:
    """The loss at points W' + sum_k t_k D_k, with the journal of the losses.

    Args:
        what: name of the measurement, in the journal.
        model, loss_fn, batches: see `loss_line`.
        noise: kind of the directions D_k, one of `NOISES`.
        options: see `Options`.

    Attributes:
        center: the loss at W'.
        how: noise, space and seed, the last fields of the results.
    """

    def __init__(
        self,
        what: str,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        noise: str,
        options: Options,
    ) -> None:
        noise, seed, space = check_noise("noise", noise), options.seed, options.space
        weights = find_weights(model, options.layers, space)
        self.how = noise, space, seed
        self.loss = MeanLoss(model, loss_fn, batches, weights, options.sizes)
        norms = all_row_norms(weights) if options.norms is None else options.norms
        self.directions = Directions(weights, noise, seed, norms)
        settings = {"what": what, "noise": noise, "space": space, "seed": seed, "weights": fingerprint(weights)}
        self.journal = Journal(options.file, settings)
        self.progress = options.progress
        self.center = self.loss()
        self.journal.check("center", self.center)
        self.journal.check("norms", sum(float(norms[weight.name].double().norm()) for weight in weights))

    def at(self, *steps: tuple[float, int]) -> float:
        """The loss at W' + sum of t * D(direction) over pairs (t, direction)."""
        steps = tuple((t, direction) for t, direction in steps if t != 0)
        if not steps:
            return self.center
        name = " + ".join(f"{t!r} D{direction}" for t, direction in steps)
        return self.journal(name, lambda: self.loss(self.directions.at(steps)))

    def along(self, distances: Sequence[float], directions: int, description: str) -> Tensor:
        """L(W' + t D_k) for each direction k and distance t, (directions, distances) float64."""
        rows = (partial(self._one, k) for k in range(directions))
        return fill_table(rows, distances, count=directions, description=description, progress=self.progress)

    def antithetic(self, strengths: Sequence[float], samples: int, description: str) -> Tensor:
        """(L(W' + t D_k) + L(W' - t D_k)) / 2 for each sample k and strength t, (samples, strengths) float64."""
        rows = (partial(self._pair, k) for k in range(samples))
        return fill_table(rows, strengths, count=samples, description=description, progress=self.progress)

    def plane(self, y: Sequence[float], x: Sequence[float], description: str) -> Tensor:
        """L(W' + x D_0 + y D_1), (y, x) float64."""
        rows = (partial(self._point, distance) for distance in y)
        return fill_table(rows, x, count=len(y), description=description, progress=self.progress)

    def _one(self, direction: int, t: float) -> float:
        return self.at((t, direction))

    def _pair(self, direction: int, t: float) -> float:
        return (self.at((t, direction)) + self.at((-t, direction))) / 2

    def _point(self, y: float, x: float) -> float:
        return self.at((x, 0), (y, 1))
