"""Estimates with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..utils.arguments import WrongType, check_fields, refuse, tensor
from .fields import how, result, same_length
from .options import check_level


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over independent samples.

    Attributes:
        estimate: the mean.
        stderr: standard error of the mean, std / sqrt(count); NaN for a single sample.
        samples: the samples.
    """

    estimate: float = how("number")
    stderr: float = how("number")
    samples: Tensor = result(tensor, dims=1)  # (count,), float64

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, samples: Tensor) -> Estimate:
        """The estimate from independent samples, (count,).

        Raises:
            ValueError: no sample.
        """
        if not len(tensor("samples", samples, dims=1)):
            refuse("samples", "at least one sample", samples)
        samples = samples.detach().to("cpu", torch.float64)
        return cls(float(samples.mean()), float(standard_error(samples, dim=0)), samples)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's t interval, which contains the true mean with probability `level` if the samples are normal."""
        half = t_quantile(level, len(self.samples) - 1) * self.stderr
        return self.estimate - half, self.estimate + half

    def __str__(self) -> str:
        return f"{self.estimate:.4g} ± {self.stderr:.2g}"


Self = TypeVar("Self", bound="Curve")


class Curve:
    """Base class of results with several samples at several points.

    A subclass is a frozen dataclass. Its class attributes `GRID` and `SAMPLES` name its field of points, (points,), and
    its field of independent samples, (samples, points). `center` is the value at the undisturbed model, and
    `ALSO_MEASURED` names further values; the other fields say how the result was measured.
    """

    GRID: ClassVar[str]
    SAMPLES: ClassVar[str]
    ALSO_MEASURED: ClassVar[tuple[str, ...]] = ()
    center: float

    def __post_init__(self) -> None:
        check_fields(self)
        same_length(self.SAMPLES, self.sampled, 1, self.GRID, len(self.grid))

    @property
    def grid(self) -> Tensor:
        """The points at which the result was measured, (points,)."""
        found: Tensor = getattr(self, self.GRID)
        return found

    @property
    def sampled(self) -> Tensor:
        """The samples, (samples, points)."""
        found: Tensor = getattr(self, self.SAMPLES)
        return found

    @property
    def mean(self) -> Tensor:
        """Mean over the samples, (points,)."""
        return self.sampled.mean(dim=0)

    @property
    def stderr(self) -> Tensor:
        """Standard error of `mean`, (points,); NaN for one sample."""
        return standard_error(self.sampled, dim=0)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of Student's t interval for the mean, (points,) each; NaN for one sample."""
        half = t_quantile(level, len(self.sampled) - 1) * self.stderr
        return self.mean - half, self.mean + half

    def estimates(self) -> dict[float, Estimate]:
        """The estimate at each point, by point."""
        return {x: Estimate.of(self.sampled[:, k]) for k, x in enumerate(self.grid.tolist())}

    def minus(self: Self, other: Self) -> Self:
        """The paired difference of two models that were measured on the same noise, sample by sample.

        Its interval is that of the difference, which is narrower than the interval of either model.

        Raises:
            ValueError: the two were not measured at the same points, on the same noise and in the same way.
        """
        if type(other) is not type(self):
            refuse("other", f"another {type(self).__name__}", other, WrongType)
        result: Any = self  # a subclass is a dataclass
        measured = (self.SAMPLES, "center", *self.ALSO_MEASURED)
        for name in [f.name for f in fields(result) if f.name not in measured]:
            ours, theirs = getattr(self, name), getattr(other, name, None)
            if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
                same = torch.equal(ours, theirs)
            else:
                same = ours == theirs
            if not same:
                raise ValueError(f"other must have the same {name} as this result, {ours}, got {theirs}")
        if self.sampled.shape != other.sampled.shape:
            counts = len(self.sampled), len(other.sampled)
            raise ValueError(f"other must have the same number of samples, {counts[0]}, got {counts[1]}")
        changes = {name: getattr(self, name) - getattr(other, name) for name in measured}
        difference: Self = replace(result, **changes)
        return difference


def standard_error(samples: Tensor, dim: int) -> Tensor:
    """Standard error of the mean along `dim`; NaN for a single sample."""
    count = samples.shape[dim]
    if count < 2:
        return torch.full_like(samples.sum(dim), math.nan)
    return samples.std(dim, correction=1) / math.sqrt(count)


def t_quantile(level: float, degrees: int) -> float:
    """Half-width of the two-sided Student's t interval of probability `level`, in standard errors.

    Solves A(t | degrees) = level by bisection, with the finite sum A for integer degrees of freedom (Abramowitz and
    Stegun 26.7.3 and 26.7.4). NaN for zero degrees of freedom.

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
