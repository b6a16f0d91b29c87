"""Generalisation under disturbance: a flat solution should lose its score more slowly.

``score_fn(model, batch)`` is any scalar that is a mean over the batch, accuracy or loss. The model is only read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flatlora.ops.philox import mix_rank, philox4x32

from ..utils import arguments
from ..utils.arguments import INT64, boolean, choice, function, integer, integers, text
from .directions import Norms
from .evaluate import Journal, LossFn, MeanLoss, bar, fingerprint, kept_rng
from .measurement import Measurement
from .norms import merged_rows
from .options import check_seed, how, points, result, samples, strengths
from .stats import Curve
from .weights import Weight, active, find_weights

MOST_BITS = 64
DISTURBANCES = ("weight noise", "rounding", "corruption")
Corrupt = Callable[[Any, float, torch.Generator], Any]  # (batch, level, random numbers) -> corrupted batch


@dataclass(frozen=True, eq=False)
class Degradation(Curve):
    """A score against the strength of a disturbance.

    Attributes:
        levels: strengths.
        scores: independent samples: draws of the noise or of the corruption, batches for rounding.
        center: the undisturbed score.
        disturbance: "weight noise", "rounding" or "corruption".
        unit: of the levels.
        seed: of the draws.
        score: what the score is, for figures.
    """

    GRID, SAMPLES = "levels", "scores"
    levels: Tensor = points()  # (levels,), float64
    scores: Tensor = samples()  # (samples, levels), float64
    center: float = how("number")
    disturbance: str = result(choice, DISTURBANCES)
    unit: str = how("text")
    seed: int = how("seed")
    score: str = result(text, default="loss")


def under_weight_noise(
    model: nn.Module,
    score_fn: LossFn,
    batches: Iterable[Any],
    *,
    rho: Sequence[float] = (0.0, 0.05, 0.1, 0.15, 0.2),
    samples: int = 8,
    seed: int = 0,
    noise: str = "filter",
    space: str = "merged",
    layers: str | Callable[[str], bool] | None = None,
    norms: Norms | None = None,
    sizes: Sequence[float] | None = None,
    score: str = "loss",
    progress: bool | None = None,
    file: str | os.PathLike | None = None,
) -> Degradation:
    """The score under random weight noise of strength rho; a sample is the mean of an antithetic pair.

    Args:
        score: what the score is, for figures.
        The rest: as in `expected_sharpness`, `score_fn` for `loss_fn`.

    Raises:
        ValueError: an argument out of bounds.
    """
    levels = strengths("rho", rho)
    samples = integer("samples", samples, 1)
    _check_shown(score, progress, score_fn)
    measured = Measurement(
        "weight noise", model, score_fn, batches,
        seed=seed, noise=noise, space=space, layers=layers, norms=norms, sizes=sizes, file=file,
    )  # fmt: skip
    scores = torch.empty(samples, len(levels), dtype=torch.float64)
    with bar(scores.numel(), "weight noise", progress) as tick:
        for k in range(samples):
            for p, r in enumerate(levels.tolist()):
                scores[k, p] = (measured.at((r, k)) + measured.at((-r, k))) / 2
                tick.update()
    return Degradation(levels, scores, measured.center, "weight noise", f"rho, {noise} noise", seed, score)


def under_rounding(
    model: nn.Module,
    score_fn: LossFn,
    batches: Iterable[Any],
    *,
    bits: Sequence[int] = (8, 6, 5, 4, 3),
    layers: str | Callable[[str], bool] | None = None,
    score: str = "loss",
    progress: bool | None = None,
    file: str | os.PathLike | None = None,
) -> Degradation:
    """The score with every merged weight W' rounded to a few bits, symmetric round-to-nearest with one scale a row.

    Rounding is not random: the samples are the batches, so let them be of one size, and the same for every model.

    Args:
        model, score_fn, batches, layers, progress, file: as in `loss_line`.
        bits: at least 2 each, the sign included.
        score: what the score is, for figures.

    Raises:
        ValueError: bits out of bounds, or a layer whose merged weight cannot be had (DoRA, quantised).
    """
    widths = integers("bits", bits, 2, MOST_BITS, expected="one or more integers >= 2")
    _check_shown(score, progress, score_fn)
    weights = find_weights(model, layers)
    for weight in weights:
        owner: Any = weight.owner
        if weight.path is None or (active(owner) and getattr(owner.get_base_layer(), "groups", 1) > 1):
            raise ValueError(
                f"layer {weight.name!r}: its merged weight cannot be rounded in place; "
                "merge the adapter first, or leave the layer out through layers="
            )
    with kept_rng():
        each = [MeanLoss(model, score_fn, [batch], weights) for batch in arguments.batches("batches", batches)]
    journal = Journal(file, {"what": "rounding", "weights": fingerprint(weights), "batches": len(each)})
    center = sum(one() for one in each) / len(each)
    journal.check("center", center)
    scores = torch.empty(len(each), len(widths), dtype=torch.float64)
    with bar(scores.numel(), "rounding", progress) as tick:
        for p, b in enumerate(widths):
            for k, one in enumerate(each):
                scores[k, p] = journal(f"{b} bits, batch {k}", partial(one, partial(_rounded, bits=b)))
                tick.update()
    levels = torch.tensor(widths, dtype=torch.float64)
    return Degradation(levels, scores, center, "rounding", "bits per weight", 0, score)


def _rounded(weight: Weight, values: Tensor, bits: int) -> Tensor:
    """W + Q(W') - W': what the base weight must be for the merged weight to be Q(W')."""
    merged = merged_rows(weight, values, torch.promote_types(values.dtype, torch.float32))
    return (values + (round_rows(merged, bits) - merged)).to(values.dtype)


def round_rows(weight: Tensor, bits: int) -> Tensor:
    """Each row to the nearest of 2^bits - 1 equally spaced values, symmetric around 0 up to its largest entry."""
    scale = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)


def under_corruption(
    model: nn.Module,
    score_fn: LossFn,
    batches: Iterable[Any],
    corrupt: Corrupt,
    *,
    levels: Sequence[float],
    samples: int = 4,
    seed: int = 0,
    unit: str = "corruption",
    sizes: Sequence[float] | None = None,
    score: str = "loss",
    progress: bool | None = None,
    file: str | os.PathLike | None = None,
) -> Degradation:
    """The score on corrupted inputs.

    Args:
        model, score_fn, batches, sizes, progress, file: as in `loss_line`.
        corrupt: ``corrupt(batch, level, generator)``, a corrupted copy of the batch; `replace_tokens` and `add_noise`
            make such functions. The generator (CPU) starts from the same state at every level and for every model.
        levels: strengths, as `corrupt` understands them.
        samples: draws.
        seed: of the draws.
        unit: of the levels, for figures.
        score: what the score is, for figures.

    Raises:
        ValueError: an argument out of bounds.
    """
    grid = strengths("levels", levels)
    samples = integer("samples", samples, 1)
    seed = check_seed("seed", seed)
    function("corrupt", corrupt, expected="corrupt(batch, level, generator)")
    text("unit", unit)
    _check_shown(score, progress, score_fn)
    with kept_rng():
        clean = arguments.batches("batches", batches)
    center = MeanLoss(model, score_fn, clean, [], sizes)()
    journal = Journal(file, {"what": "corruption", "unit": unit, "seed": seed, "batches": len(clean)})
    journal.check("center", center)

    def corrupted(level: float, k: int) -> float:
        with kept_rng():
            bad = [corrupt(batch, level, _generator(seed, k, i)) for i, batch in enumerate(clean)]
        return MeanLoss(model, score_fn, bad, [], sizes)()

    scores = torch.empty(samples, len(grid), dtype=torch.float64)
    with bar(scores.numel(), "corruption", progress) as tick:
        for k in range(samples):
            for p, level in enumerate(grid.tolist()):
                scores[k, p] = journal(f"{level!r}, draw {k}", partial(corrupted, level, k))
                tick.update()
    return Degradation(grid, scores, center, "corruption", unit, seed, score)


def replace_tokens(vocabulary: int, field: str | int | None = "input_ids", keep: Sequence[int] = ()) -> Corrupt:
    """A corruption of text: each token becomes a random one with probability `level`.

    Args:
        vocabulary: size of it.
        field: of the batch that holds the token ids: a key, a position, or None for a batch that is the tensor.
        keep: ids that are left alone, padding and the like.
    """
    vocabulary = integer("vocabulary", vocabulary, 1)
    _check_field(field)
    kept = integers("keep", keep, -INT64, INT64, expected="a sequence of token ids", empty=True)

    def corrupt(batch: Any, level: float, generator: torch.Generator) -> Any:
        ids = batch if field is None else batch[field]
        hit = torch.rand(ids.shape, generator=generator).to(ids.device) < level
        other = torch.randint(vocabulary, ids.shape, generator=generator).to(ids.device, ids.dtype)
        hit &= ~torch.isin(ids, torch.tensor(kept, dtype=ids.dtype, device=ids.device))
        return _with(batch, field, torch.where(hit, other, ids))

    return corrupt


def add_noise(field: str | int | None = None) -> Corrupt:
    """A corruption of continuous inputs: Gaussian noise, `level` times the standard deviation of the batch's values.

    Args:
        field: of the batch that is disturbed: a key, a position, or None for a batch that is the tensor.
    """
    _check_field(field)

    def corrupt(batch: Any, level: float, generator: torch.Generator) -> Any:
        x = batch if field is None else batch[field]
        z = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
        return _with(batch, field, x + level * x.std() * z)

    return corrupt


def _check_field(field: Any) -> None:
    if field is not None and not isinstance(field, str):
        integer("field", field, -INT64, INT64, expected="a key, a position or None")


def _check_shown(score: Any, progress: Any, score_fn: Any) -> None:
    text("score", score)
    boolean("progress", progress, optional=True)
    function("score_fn", score_fn, expected="score_fn(model, batch)")


def _with(batch: Any, field: str | int | None, value: Tensor) -> Any:
    """A copy of the batch in which one field has another value."""
    if field is None:
        return value
    if isinstance(field, str):
        return {**batch, field: value}
    return type(batch)([value if k == field else part for k, part in enumerate(batch)])


def _generator(seed: int, sample: int, batch: int) -> torch.Generator:
    mixed = mix_rank(seed, 0x0BADDA7A)
    low, high, _, _ = philox4x32((batch, sample, 0, 0), (mixed & 0xFFFFFFFF, (mixed >> 32) & 0xFFFFFFFF))
    return torch.Generator().manual_seed((high << 32 | low) >> 1)
