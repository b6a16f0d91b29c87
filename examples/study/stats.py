"""The statistics of the report: paired over seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from flatlora.analysis.stats import standard_error

RESAMPLES = 10_000
LARGEST_EXACT = 16  # pairs up to which all sign flips are looked at


def bootstrap_interval(differences: Tensor, level: float = 0.95, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile interval of the mean of paired differences, over resampled seeds; the same at every call.

    Args:
        differences: one per seed, (seeds,).
    """
    generator = torch.Generator().manual_seed(0)
    n = len(differences)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    means = differences.double()[drawn].mean(1)
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def sign_flip_p(differences: Tensor, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of the mean under flips of the signs: exact to 16 pairs, sampled beyond.

    Example:
        >>> sign_flip_p(torch.ones(10)) == 2 / 1024
        True
    """
    d = differences.double()
    if len(d) <= LARGEST_EXACT:
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(d))), dtype=torch.float64)
        extra = 0
    else:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (resamples, len(d)), generator=generator).double() * 2 - 1
        extra = 1  # the observed signs are one of the flips
    sums, rounding = (signs @ d).abs(), 1e-9 * d.abs().sum()  # ties are frequent, and must count
    hits = int((sums >= d.sum().abs() - rounding).sum())
    return (hits + extra) / (len(signs) + extra)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = largest
    return adjusted


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ties share their mean, (n,)."""
    less = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return less + (equal + 1).double() / 2


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation; NaN where one of the two is constant."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    return (a @ b / (a.norm() * b.norm())).item()


def spearman_interval(x: Tensor, y: Tensor, seeds: Tensor, resamples: int = 2000) -> tuple[float, float]:
    """Percentile interval of the rank correlation; whole seeds are resampled, since runs of one seed are alike.

    Args:
        x, y, seeds: one entry a run, (runs,).
    """
    generator = torch.Generator().manual_seed(0)
    groups = [torch.nonzero(seeds == seed).flatten() for seed in seeds.unique()]
    found = []
    for _ in range(resamples):
        drawn = torch.randint(len(groups), (len(groups),), generator=generator).tolist()
        index = torch.cat([groups[k] for k in drawn])
        found.append(spearman(x[index], y[index]))
    low, high = torch.tensor(found, dtype=torch.float64).nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error, (seeds,)."""
    return values.double().mean().item(), standard_error(values.double(), 0).item()
