"""What every measurement along random directions shares: the weights, the directions, the loss, the journal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ..utils.arguments import choice
from .directions import Directions, Norms
from .evaluate import Journal, LossFn, MeanLoss, fingerprint
from .norms import all_row_norms
from .options import NOISES, check_norms, check_seed
from .weights import find_weights


class Measurement:
    """The loss of one model at points W' + sum_k t_k D_k; `center` is the loss at W'.

    Args:
        what: name of the measurement, written into the journal.
        The rest as in `loss_line`.
    """

    def __init__(
        self,
        what: str,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        *,
        seed: int,
        noise: str,
        space: str,
        layers: str | Callable[[str], bool] | None,
        norms: Norms | None,
        sizes: Sequence[float] | None,
        file: str | os.PathLike | None,
    ) -> None:
        check_norms("norms", norms)
        weights = find_weights(model, layers, space)
        choice("noise", noise, NOISES)
        seed = check_seed("seed", seed)
        self.loss = MeanLoss(model, loss_fn, batches, weights, sizes)
        norms = all_row_norms(weights) if norms is None else norms
        self.along = Directions(weights, noise, seed, norms)
        settings = {"what": what, "noise": noise, "space": space, "seed": seed, "weights": fingerprint(weights)}
        self.journal = Journal(file, settings)
        self.center = self.loss()
        self.journal.check("center", self.center)
        self.journal.check("norms", sum(float(norms[weight.name].double().norm()) for weight in weights))

    def at(self, *steps: tuple[float, int]) -> float:
        """The loss at W' + sum of t * D(direction) over the steps (t, direction)."""
        steps = tuple((t, direction) for t, direction in steps if t != 0)
        if not steps:
            return self.center
        name = " + ".join(f"{t!r} D{direction}" for t, direction in steps)
        return self.journal(name, lambda: self.loss(self.along.at(steps)))
