"""How much the loss rises around a solution, on average and at worst."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.arguments import boolean, integer, tensor
from .directions import Norms, probe
from .evaluate import Journal, LossFn, MeanLoss, bar, fingerprint
from .gradients import Variables
from .measurement import Measurement
from .options import check_seed, how, points, result, samples, strengths
from .stats import Curve
from .weights import find_weights


@dataclass(frozen=True, eq=False)
class ExpectedSharpness(Curve):
    """E_eps[L(W' + eps)] - L(W') at several strengths of the noise; mean, stderr and interval are over the noise.

    Attributes:
        rho: strengths.
        rises: one antithetic pair each, (L(W' + eps) + L(W' - eps)) / 2 - L(W'); independent over samples, the same
            z at every rho.
        center: L(W').
        noise, space, seed: what the noise is; results with the same three can be compared sample by sample.
    """

    GRID, SAMPLES = "rho", "rises"
    rho: Tensor = points()  # (strengths,), float64
    rises: Tensor = samples()  # (samples, strengths), float64
    center: float = how("number")
    noise: str = how("noise")
    space: str = how("space")
    seed: int = how("seed")


def expected_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    rho: float | Sequence[float] = 0.05,
    samples: int = 8,
    seed: int = 0,
    noise: str = "filter",
    space: str = "merged",
    layers: str | Callable[[str], bool] | None = None,
    norms: Norms | None = None,
    sizes: Sequence[float] | None = None,
    progress: bool | None = None,
    file: str | os.PathLike | None = None,
) -> ExpectedSharpness:
    r"""The mean rise of the loss under random weight noise, the quantity Flat-LoRA makes small.

    .. math::
        S(\rho) = E_\epsilon L(W' + \epsilon) - L(W'), \qquad
        \epsilon_{ij} \sim N(0, \rho^2 \|W'_i\|^2 / n)

    by antithetic pairs, which cancel the odd terms of the loss; for a quadratic loss S = tr(H Sigma) / 2. The model is
    only read, as in `loss_line`; cost: 2 * samples * strengths + 1 passes over the batches.

    Args:
        model, loss_fn, batches, seed, space, layers, norms, sizes, progress, file: as in `loss_line`.
        rho: strengths; default 0.05 (Flat-LoRA, arXiv 2409.14396, for language models).
        samples: antithetic pairs.
        noise: "filter" (Flat-LoRA's), "filter_normalised", "layer" or "plain".

    Raises:
        ValueError: an argument out of bounds.
    """
    levels = strengths("rho", rho)
    samples = integer("samples", samples, 1)
    boolean("progress", progress, optional=True)
    loss = Measurement(
        "expected sharpness", model, loss_fn, batches,
        seed=seed, noise=noise, space=space, layers=layers, norms=norms, sizes=sizes, file=file,
    )  # fmt: skip
    rises = torch.empty(samples, len(levels), dtype=torch.float64)
    with bar(rises.numel(), "expected sharpness", progress) as tick:
        for k in range(samples):
            for p, r in enumerate(levels.tolist()):
                rises[k, p] = (loss.at((r, k)) + loss.at((-r, k))) / 2 - loss.center
                tick.update()
    return ExpectedSharpness(levels, rises, loss.center, noise, space, seed)


@dataclass(frozen=True, eq=False)
class SamSharpness(Curve):
    """max of L(W' + e) - L(W') over ||e||_F <= rho, e over all chosen weights together.

    Attributes:
        rho: radii.
        rises: the largest rise found, of each batch by itself (or of all together); a lower bound of the maximum.
        first_order: rho ||grad L||, what the maximum is to first order.
        center: L(W').
        space: "merged" or "adapter".
        steps: of the ascent.
    """

    GRID, SAMPLES = "rho", "rises"
    rho: Tensor = points()  # (radii,), float64
    rises: Tensor = samples()  # (batches or 1, radii), float64
    first_order: Tensor = samples()  # (batches or 1, radii), float64
    center: float = how("number")
    space: str = how("space")
    steps: int = result(integer, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        tensor("first_order", self.first_order, shape=tuple(self.rises.shape))


def sam_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    rho: float | Sequence[float] = 0.05,
    steps: int = 1,
    space: str = "merged",
    per_batch: bool = True,
    seed: int = 0,
    layers: str | Callable[[str], bool] | None = None,
    sizes: Sequence[float] | None = None,
    progress: bool | None = None,
    file: str | os.PathLike | None = None,
) -> SamSharpness:
    r"""The worst rise of the loss within a ball, the sharpness of SAM (Foret et al. 2021, arXiv 2010.01412).

    .. math::
        \max_{\|e\|_F \le \rho} L(W' + e) - L(W'), \qquad e_1 = \rho\, g / \|g\|, \quad
        e_{k+1} = P_\rho(e_k + \rho\, g(W' + e_k) / \|g(W' + e_k)\|)

    One step is SAM's own; more find more. Where the gradient vanishes the ascent starts in a random direction. The
    space of the merged weights and that of the adapters' factors differ (Flat-LoRA, arXiv 2409.14396, figure 1):
    measure both. The model is only read. Three vectors of the size of the chosen weights are held.

    Args:
        model, loss_fn, batches, layers, sizes, progress, file: as in `loss_line`.
        rho: radii, Frobenius norm over all chosen weights; default 0.05 (SAM's).
        steps: of gradient ascent.
        space: "merged" or "adapter".
        per_batch: the maximum of each batch by itself (m-sharpness), whose spread is the uncertainty; False takes the
            mean loss over all batches, one number without one.
        seed: of the random start.

    Raises:
        ValueError: an argument out of bounds.
    """
    radii = strengths("rho", rho)
    steps = integer("steps", steps, 1)
    seed = check_seed("seed", seed)
    per_batch = boolean("per_batch", per_batch)
    boolean("progress", progress, optional=True)
    weights = find_weights(model, layers, space)
    loss = MeanLoss(model, loss_fn, batches, weights, sizes)
    variables = Variables(loss)
    pairs = list(zip(loss.shares, loss.batches, strict=True))
    groups = [[(1.0, batch)] for _, batch in pairs] if per_batch else [pairs]
    settings = {"what": "SAM sharpness", "space": space, "steps": steps, "seed": seed, "groups": len(groups)}
    journal = Journal(file, settings | {"weights": fingerprint(weights)})
    rises, first = torch.empty(2, len(groups), len(radii), dtype=torch.float64)
    centers = []
    with bar(rises.numel(), "SAM sharpness", progress) as tick:
        for k, group in enumerate(groups):
            center, gradient = variables.gradient(group)
            centers.append(center)
            journal.check(f"center of batch {k}", center)
            first[k] = radii * gradient.double().norm().item()
            start = gradient if gradient.any() else probe(variables, seed, 0)
            for p, radius in enumerate(radii.tolist()):
                climb = partial(_ascend, variables, group, start, radius, steps)
                rises[k, p] = journal(f"radius {radius!r}, batch {k}", climb) - center
                tick.update()
    shares = loss.shares if per_batch else [1.0]
    center = sum(share * c for share, c in zip(shares, centers, strict=True))
    return SamSharpness(radii, rises, first, center, space, steps)


def _ascend(variables: Variables, group: list[tuple[float, Any]], start: Tensor, radius: float, steps: int) -> float:
    """The largest loss along the projected ascent of the ball."""
    e = start * (radius / start.norm())
    best = -math.inf
    for _ in range(steps - 1 if radius else 0):
        value, gradient = variables.gradient(group, e)
        best = max(best, value)
        if gradient.any():
            e = e + gradient * (radius / gradient.norm())
            e = e * min(1.0, radius / float(e.norm()))
    return max(best, variables.value(group, e))
