"""Estimates that carry their own uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..utils.arguments import WrongType, check_fields, refuse, tensor
from .options import check_level, how, result, same_length


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over independent samples.

    Attributes:
        estimate: the mean.
        stderr: standard deviation of the samples / sqrt(their number); NaN for a single sample.
        samples: what was averaged.
    """

    estimate: float = how("number")
    stderr: float = how("number")
    samples: Tensor = result(tensor, dims=1)  # (count,), float64

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, samples: Tensor) -> Estimate:
        """The estimate from independent samples, (count,)."""
        if not len(tensor("samples", samples, dims=1)):
            refuse("samples", "at least one sample", samples)
        samples = samples.detach().to("cpu", torch.float64)
        return cls(float(samples.mean()), float(standard_error(samples, dim=0)), samples)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's interval that holds the truth with probability `level`, for normally distributed samples."""
        half = t_quantile(level, len(self.samples) - 1) * self.stderr
        return self.estimate - half, self.estimate + half

    def __str__(self) -> str:
        return f"{self.estimate:.4g} ± {self.stderr:.2g}"


Self = TypeVar("Self", bound="Curve")


class Curve:
    """What a result measured over several samples at several points can do: the base of the frozen dataclasses.

    A subclass names its field of points, (points,), and its field of independent samples, (samples, points). Any other
    field says how it was measured, but for `center`, the value at the undisturbed model.
    """

    GRID: ClassVar[str]
    SAMPLES: ClassVar[str]
    center: float

    def __post_init__(self) -> None:
        check_fields(self)
        same_length(self.SAMPLES, getattr(self, self.SAMPLES), 1, self.GRID, len(getattr(self, self.GRID)))

    @property
    def mean(self) -> Tensor:
        """Mean over the samples, (points,)."""
        return getattr(self, self.SAMPLES).mean(dim=0)

    @property
    def stderr(self) -> Tensor:
        """Standard error of `mean`, (points,); NaN for one sample."""
        return standard_error(getattr(self, self.SAMPLES), dim=0)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Student's interval for the mean, two times (points,); NaN for one sample."""
        half = t_quantile(level, len(getattr(self, self.SAMPLES)) - 1) * self.stderr
        return self.mean - half, self.mean + half

    def estimates(self) -> dict[float, Estimate]:
        """Point -> estimate with its standard error and samples."""
        samples = getattr(self, self.SAMPLES)
        return {x: Estimate.of(samples[:, k]) for k, x in enumerate(getattr(self, self.GRID).tolist())}

    def minus(self: Self, other: Self) -> Self:
        """The paired difference, sample by sample: of two models measured on the same noise, with the interval of the
        difference, which is narrower than that of either.

        Raises:
            ValueError: the two were not measured at the same points, on the same noise, in the same way.
        """
        if type(other) is not type(self):
            refuse("other", f"another {type(self).__name__}", other, WrongType)
        skip = (self.SAMPLES, "center")
        for name in [f.name for f in fields(self) if f.name not in skip]:  # type: ignore[arg-type]
            ours, theirs = getattr(self, name), getattr(other, name, None)
            if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
                same = torch.equal(ours, theirs)
            else:
                same = ours == theirs
            if not same:
                raise ValueError(f"other must have the same {name} as this result, {ours}, got {theirs}")
        ours, theirs = getattr(self, self.SAMPLES), getattr(other, self.SAMPLES)
        if ours.shape != theirs.shape:
            raise ValueError(f"other must have the same number of samples, {len(ours)}, got {len(theirs)}")
        changes = {self.SAMPLES: ours - theirs, "center": self.center - other.center}
        return replace(self, **changes)  # type: ignore[type-var]


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
    level = check_level("level", level)
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
