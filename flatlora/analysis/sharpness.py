"""Sharpness: how much the loss rises around a solution, on average and at worst."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..utils.arguments import boolean, integer, tensor
from .directions import probe
from .displacement import find_weights
from .fields import how, points, result, samples
from .gradients import WeightVector
from .journal import Journal, fingerprint
from .mean_loss import LossFn, MeanLoss
from .measurement import Measurement
from .options import File, Layers, OptionKeywords, Options, check_progress, check_seed, measures, strengths
from .stats import Curve
from .table import fill_table

if TYPE_CHECKING:
    from typing_extensions import Unpack

Batches = list[tuple[float, Any]]  # (share in the mean, batch)


@dataclass(frozen=True, eq=False)
class ExpectedSharpness(Curve):
    """E_eps[L(W' + eps)] - L(W') at several strengths of the noise; mean, stderr and interval are over the noise.

    Attributes:
        rho: strengths.
        rises: one antithetic pair each, (L(W' + eps) + L(W' - eps)) / 2 - L(W'). Samples are independent; a sample
            uses the same z at every rho.
        center: L(W').
        noise, space, seed: kind of the noise. Results with the same three can be compared sample by sample.
    """

    GRID, SAMPLES = "rho", "rises"
    rho: Tensor = points()  # (strengths,), float64
    rises: Tensor = samples()  # (samples, strengths), float64
    center: float = how("number")
    noise: str = how("noise")
    space: str = how("space")
    seed: int = how("seed")


@measures
def expected_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    rho: float | Sequence[float] = 0.05,
    samples: int = 8,
    noise: str = "filter",
    **options: Unpack[OptionKeywords],
) -> ExpectedSharpness:
    r"""Mean rise of the loss under random weight noise, the quantity that Flat-LoRA minimizes.

    .. math::
        S(\rho) = E_\epsilon L(W' + \epsilon) - L(W'), \qquad
        \epsilon_{ij} \sim N(0, \rho^2 \|W'_i\|^2 / n)

    It is estimated from antithetic pairs, which cancel the odd terms of the loss; for a quadratic loss
    S = tr(H Sigma) / 2. The model is only read, as in `loss_line`. Cost: 2 * samples * strengths + 1 passes over the
    batches.

    Args:
        model, loss_fn, batches, options: see `loss_line`.
        rho: strengths; default 0.05 (Flat-LoRA, arXiv 2409.14396, for language models).
        samples: number of antithetic pairs.
        noise: "filter" (Flat-LoRA), "filter_normalized", "layer" or "plain"; see `flatlora.analysis.directions`.

    Raises:
        ValueError: an argument out of bounds.
    """
    shared = Options.of(expected_sharpness, options)
    levels = strengths("rho", rho)
    samples = integer("samples", samples, 1)
    measured = Measurement("expected sharpness", model, loss_fn, batches, noise, shared)
    rises = measured.antithetic(levels.tolist(), samples, "expected sharpness") - measured.center
    return ExpectedSharpness(levels, rises, measured.center, *measured.how)


@dataclass(frozen=True, eq=False)
class SamSharpness(Curve):
    """max of L(W' + e) - L(W') over ||e||_F <= rho, e over all chosen weights together.

    Attributes:
        rho: radii.
        rises: the largest rise found, for each batch (or for all batches together); a lower bound of the maximum.
        first_order: rho ||grad L||, the maximum to first order.
        center: L(W').
        space: "merged" or "adapter".
        steps: number of ascent steps.
    """

    GRID, SAMPLES = "rho", "rises"
    ALSO_MEASURED = ("first_order",)
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
    layers: Layers = None,
    sizes: Sequence[float] | None = None,
    progress: bool | None = None,
    file: File = None,
) -> SamSharpness:
    r"""Largest rise of the loss within a ball, the sharpness of SAM (Foret et al. 2021, arXiv 2010.01412).

    .. math::
        \max_{\|e\|_F \le \rho} L(W' + e) - L(W'), \qquad e_1 = \rho\, g / \|g\|, \quad
        e_{k+1} = P_\rho(e_k + \rho\, g(W' + e_k) / \|g(W' + e_k)\|)

    One step is SAM's own approximation; more steps find a larger rise. Where the gradient is zero the ascent starts in
    a random direction. The space of the merged weights and that of the factors differ (Flat-LoRA, arXiv 2409.14396,
    figure 1): measure both. The model is only read. Three vectors of the size of the chosen weights are held.

    Args:
        model, loss_fn, batches: see `loss_line`.
        rho: radii, Frobenius norm over all chosen weights; default 0.05 (SAM).
        steps: number of gradient ascent steps.
        space, layers, progress, file: see `flatlora.analysis.options.Options`.
        sizes: weight of each batch in `center`, and in the loss that ``per_batch=False`` maximizes. With
            ``per_batch=True`` the batches are the samples: `mean`, `stderr` and `interval` count each one alike.
        per_batch: maximize for each batch separately (m-sharpness), so that the spread over the batches is the
            uncertainty; False maximizes the mean loss over all batches and gives one number without uncertainty.
        seed: of the random start.

    Raises:
        ValueError: an argument out of bounds.
    """
    radii = strengths("rho", rho)
    steps = integer("steps", steps, 1)
    seed = check_seed("seed", seed)
    per_batch = boolean("per_batch", per_batch)
    check_progress(progress)
    weights = find_weights(model, layers, space)
    loss = MeanLoss(model, loss_fn, batches, weights, sizes)
    vector = WeightVector(loss)
    pairs = list(zip(loss.shares, loss.batches, strict=True))
    groups = [[(1.0, batch)] for _, batch in pairs] if per_batch else [pairs]
    settings = {"what": "SAM sharpness", "space": space, "steps": steps, "seed": seed, "groups": len(groups)}
    journal = Journal(file, settings | {"weights": fingerprint(weights)})
    centers, slopes = [], []

    def rows() -> Iterator[Callable[[float], float]]:
        for k, group in enumerate(groups):
            center, gradient = vector.gradient(group)
            centers.append(center)
            slopes.append(gradient.double().norm().item())
            journal.check(f"center of batch {k}", center)
            start = gradient if gradient.any() else probe(vector, seed, 0)
            yield partial(_rise, journal, k, center, partial(_ascend, vector, group, start, steps))

    options: dict[str, Any] = {"description": "SAM sharpness", "progress": progress}
    rises = fill_table(rows(), radii.tolist(), count=len(groups), **options)
    first_order = torch.stack([radii * slope for slope in slopes])
    shares = loss.shares if per_batch else [1.0]
    center = sum(share * c for share, c in zip(shares, centers, strict=True))
    return SamSharpness(radii, rises, first_order, center, space, steps)


def _rise(journal: Journal, k: int, center: float, ascend: Callable[[float], float], radius: float) -> float:
    return journal(f"radius {radius!r}, batch {k}", partial(ascend, radius)) - center


def _ascend(vector: WeightVector, batches: Batches, start: Tensor, steps: int, radius: float) -> float:
    """The largest loss along the projected gradient ascent in a ball."""
    e = start * (radius / start.norm())
    best = -math.inf
    for _ in range(steps - 1 if radius else 0):
        value, gradient = vector.gradient(batches, e)
        best = max(best, value)
        if gradient.any():
            e = e + gradient * (radius / gradient.norm())
            e = e * min(1.0, radius / float(e.norm()))
    return max(best, vector.value(batches, e))
