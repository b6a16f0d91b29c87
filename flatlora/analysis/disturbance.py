"""Score of a model under weight noise, rounding of the weights and corruption of the inputs.

A flat solution should lose its score more slowly. ``score_fn(model, batch)`` returns any scalar that is a mean over the
batch, accuracy or loss. The model is only read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flatlora.ops.philox import mix_rank, philox4x32

from ..utils import arguments
from ..utils.arguments import INT64, choice, function, integer, integers, text
from ..utils.dtypes import accumulation_dtype
from ..utils.random_states import preserved_rng
from .displacement import Weight, active, find_weights
from .fields import how, points, result, samples
from .journal import Journal, fingerprint
from .mean_loss import LossFn, MeanLoss
from .measurement import Measurement
from .merged_norms import merged_rows
from .options import File, Layers, OptionKeywords, Options, check_progress, check_seed, measures, strengths
from .stats import Curve
from .table import fill_table

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_BITS = 64
DISTURBANCES = ("weight noise", "rounding", "corruption")
Corrupt = Callable[[Any, float, torch.Generator], Any]  # (batch, level, generator) -> corrupted batch


@dataclass(frozen=True, eq=False)
class Degradation(Curve):
    """A score as a function of the strength of a disturbance.

    Attributes:
        levels: strengths.
        scores: independent samples: draws of the noise or of the corruption; batches for rounding.
        center: the undisturbed score.
        disturbance: "weight noise", "rounding" or "corruption".
        unit: of the levels.
        seed: of the draws.
        score: name of the score, for figures.
    """

    GRID, SAMPLES = "levels", "scores"
    levels: Tensor = points()  # (levels,), float64
    scores: Tensor = samples()  # (samples, levels), float64
    center: float = how("number")
    disturbance: str = result(choice, DISTURBANCES)
    unit: str = how("text")
    seed: int = how("seed")
    score: str = result(text, default="loss")


@measures
def under_weight_noise(
    model: nn.Module,
    score_fn: LossFn,
    batches: Iterable[Any],
    *,
    rho: Sequence[float] = (0.0, 0.05, 0.1, 0.15, 0.2),
    samples: int = 8,
    noise: str = "filter",
    score: str = "loss",
    **options: Unpack[OptionKeywords],
) -> Degradation:
    """The score under random weight noise of strength rho; a sample is the mean of an antithetic pair.

    Args:
        model, batches, rho, samples, noise, options: see `expected_sharpness`.
        score_fn: ``score_fn(model, batch)`` returns a scalar tensor, the mean over the batch.
        score: name of the score, for figures.

    Raises:
        ValueError: an argument out of bounds.
    """
    shared = Options.of(under_weight_noise, options)
    levels = strengths("rho", rho)
    samples = integer("samples", samples, 1)
    _check_score(score, score_fn)
    measured = Measurement("weight noise", model, score_fn, batches, noise, shared)
    scores = measured.antithetic(levels.tolist(), samples, "weight noise")
    used, _, seed = measured.how
    return Degradation(levels, scores, measured.center, "weight noise", f"rho, {used} noise", seed, score)


def under_rounding(
    model: nn.Module,
    score_fn: LossFn,
    batches: Iterable[Any],
    *,
    bits: Sequence[int] = (8, 6, 5, 4, 3),
    layers: Layers = None,
    score: str = "loss",
    progress: bool | None = None,
    file: File = None,
) -> Degradation:
    """The score with each merged weight W' rounded to a few bits: symmetric, to nearest, one scale for each row.

    Rounding is not random, so the samples are the batches: use batches of one size, the same for all models.

    Args:
        model, batches: see `loss_line`.
        score_fn, score: see `under_weight_noise`.
        bits: at least 2 each, including the sign.
        layers, progress, file: see `flatlora.analysis.options.Options`.

    Raises:
        ValueError: bits out of bounds, or a layer whose merged weight is not available (DoRA, quantized).
    """
    widths = integers("bits", bits, 2, MAX_BITS, expected="one or more integers >= 2")
    _check_score(score, score_fn)
    check_progress(progress)
    weights = find_weights(model, layers)
    for weight in weights:
        owner: Any = weight.owner
        if weight.path is None or (active(owner) and getattr(owner.get_base_layer(), "groups", 1) > 1):
            raise ValueError(
                f"layer {weight.name!r}: its merged weight cannot be rounded in place; "
                "merge the adapter first, or leave the layer out through layers="
            )
    with preserved_rng():
        losses = [MeanLoss(model, score_fn, [batch], weights) for batch in arguments.batches("batches", batches)]
    journal = Journal(file, {"what": "rounding", "weights": fingerprint(weights), "batches": len(losses)})
    center = sum(loss() for loss in losses) / len(losses)
    journal.check("center", center)

    def rounded_score(k: int, width: int) -> float:
        return journal(f"{width} bits, batch {k}", partial(losses[k], partial(_rounded, bits=width)))

    rows = (partial(rounded_score, k) for k in range(len(losses)))
    scores = fill_table(rows, widths, count=len(losses), description="rounding", progress=progress)
    levels = torch.tensor(widths, dtype=torch.float64)
    return Degradation(levels, scores, center, "rounding", "bits per weight", 0, score)


def _rounded(weight: Weight, values: Tensor, bits: int) -> Tensor:
    """W + Q(W') - W': the base weight with which the merged weight is Q(W')."""
    merged = merged_rows(weight, values, accumulation_dtype(values.dtype))
    return (values + (round_rows(merged, bits) - merged)).to(values.dtype)


def round_rows(weight: Tensor, bits: int) -> Tensor:
    """Round each row to the nearest of 2^bits - 1 equally spaced values, symmetric around 0 up to its largest entry."""
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
    file: File = None,
) -> Degradation:
    """The score on corrupted inputs.

    Args:
        model, batches: see `loss_line`.
        score_fn, score: see `under_weight_noise`.
        corrupt: ``corrupt(batch, level, generator)`` returns a corrupted copy of the batch; `replace_tokens` and
            `add_noise` make such functions. The generator (CPU) is in the same state at each level and for each model.
        levels: strengths, in the unit of `corrupt`.
        samples: number of draws.
        seed: of the draws.
        unit: of the levels, for figures.
        sizes, progress, file: see `flatlora.analysis.options.Options`.

    Raises:
        ValueError: an argument out of bounds.
    """
    grid = strengths("levels", levels)
    samples = integer("samples", samples, 1)
    seed = check_seed("seed", seed)
    function("corrupt", corrupt, expected="corrupt(batch, level, generator)")
    text("unit", unit)
    _check_score(score, score_fn)
    check_progress(progress)
    with preserved_rng():
        clean = arguments.batches("batches", batches)
    center = MeanLoss(model, score_fn, clean, [], sizes)()
    journal = Journal(file, {"what": "corruption", "unit": unit, "seed": seed, "batches": len(clean)})
    journal.check("center", center)

    def measure(level: float, k: int) -> float:
        with preserved_rng():
            corrupted = [corrupt(batch, level, _generator(seed, k, i)) for i, batch in enumerate(clean)]
        return MeanLoss(model, score_fn, corrupted, [], sizes)()

    def corrupted_score(k: int, level: float) -> float:
        return journal(f"{level!r}, draw {k}", partial(measure, level, k))

    rows = (partial(corrupted_score, k) for k in range(samples))
    scores = fill_table(rows, grid.tolist(), count=samples, description="corruption", progress=progress)
    return Degradation(grid, scores, center, "corruption", unit, seed, score)


def replace_tokens(vocabulary: int, field: str | int | None = "input_ids", keep: Sequence[int] = ()) -> Corrupt:
    """A corruption of text: each token is replaced by a random one with probability `level`.

    Args:
        vocabulary: size of the vocabulary.
        field: where the batch holds the token ids: a key, a position (also from the end), or None: the batch itself.
        keep: ids that are not replaced, such as padding.

    Returns:
        A function for `under_corruption`.

    Raises:
        ValueError: an argument out of bounds.
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
    """A corruption of continuous inputs: Gaussian noise of `level` times the standard deviation of the batch.

    Args:
        field: where the batch holds the inputs: a key, a position (also from the end), or None: the batch itself.

    Returns:
        A function for `under_corruption`.

    Raises:
        ValueError: a field that is no key, position or None.
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


def _check_score(score: Any, score_fn: Any) -> None:
    text("score", score)
    function("score_fn", score_fn, expected="score_fn(model, batch)")


def _with(batch: Any, field: str | int | None, value: Tensor) -> Any:
    """A copy of the batch with another value in one field."""
    if field is None:
        return value
    if isinstance(field, str):
        return {**batch, field: value}
    parts = list(batch)
    parts[field] = value
    return type(batch)(parts)


def _generator(seed: int, sample: int, batch: int) -> torch.Generator:
    mixed = mix_rank(seed, 0x0BADDA7A)
    low, high, _, _ = philox4x32((batch, sample, 0, 0), (mixed & 0xFFFFFFFF, (mixed >> 32) & 0xFFFFFFFF))
    return torch.Generator().manual_seed((high << 32 | low) >> 1)
