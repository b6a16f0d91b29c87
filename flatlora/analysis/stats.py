"""Estimates that carry their own uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over independent samples.

    Attributes:
        estimate: the mean.
        stderr: standard deviation of the samples / sqrt(their number); NaN for a single sample.
        samples: what was averaged.
    """

    estimate: float
    stderr: float
    samples: Tensor  # (count,), float64

    @classmethod
    def of(cls, samples: Tensor) -> Estimate:
        """The estimate from independent samples, (count,)."""
        samples = samples.detach().to("cpu", torch.float64)
        return cls(float(samples.mean()), float(standard_error(samples, dim=0)), samples)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's interval that holds the truth with probability `level`, for normally distributed samples."""
        half = t_quantile(level, len(self.samples) - 1) * self.stderr
        return self.estimate - half, self.estimate + half

    def __str__(self) -> str:
        return f"{self.estimate:.4g} ± {self.stderr:.2g}"


def standard_error(samples: Tensor, dim: int) -> Tensor:
    """Standard error of the mean along `dim`; NaN where there is one sample."""
    count = samples.shape[dim]
    if count < 2:
        return torch.full_like(samples.sum(dim), math.nan)
    return samples.std(dim, correction=1) / math.sqrt(count)


def t_quantile(level: float, degrees: int) -> float:
    """The half-width, in standard errors, of the two-sided Student interval of probability `level`.

    Solves A(t | degrees) = level by bisection, A the finite sum for whole degrees of freedom (Abramowitz and Stegun
    26.7.3 and 26.7.4). NaN for no degree of freedom.

    Raises:
        ValueError: level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if degrees < 1:
        return math.nan
    low, high = 0.0, math.pi / 2  # theta = atan(t / sqrt(degrees))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, degrees) < level else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(degrees)


def _student(theta: float, degrees: int) -> float:
    """P(|T| < tan(theta) sqrt(degrees))."""
    sin, cos = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term, total = (cos, 0.0) if odd else (1.0, 0.0)
    for k in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= cos * cos * (k + 1) / (k + 2)
    return 2 / math.pi * (theta + sin * total) if odd else sin * total
