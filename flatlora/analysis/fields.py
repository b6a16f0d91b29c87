"""Fields of result dataclasses, each with its check.

A result is checked when it is made: by a measurement, from a file, or by hand.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from ..utils.arguments import Check, checker, real, refuse, tensor, text
from .options import check_noise, check_seed, check_space


def result(check: Check, *args: Any, default: Any = ..., **kwargs: Any) -> Any:
    """A dataclass field whose value must pass ``check(name, value, *args, **kwargs)``."""
    given = {} if default is ... else {"default": default}
    return field(**given, metadata={"check": checker(check, *args, **kwargs)})


def points() -> Any:
    """A field of grid points: finite, (points,)."""
    return result(_check_points)


def samples() -> Any:
    """A field of samples: a matrix that is not empty."""
    return result(_check_samples)


def how(name: str) -> Any:
    """A field that says how a result was measured: its noise, space or seed, a number or a text."""
    checks: dict[str, Check] = {
        "noise": check_noise,
        "space": check_space,
        "seed": check_seed,
        "text": text,
        "number": real,
    }
    return result(checks[name])


def _check_points(name: str, value: Any) -> Tensor:
    found = tensor(name, value, dims=1)
    if not torch.isfinite(found).all() or not len(found):
        refuse(name, "one or more finite numbers", value)
    return found


def _check_samples(name: str, value: Any) -> Tensor:
    found = tensor(name, value, dims=2)
    if not found.numel():
        refuse(name, "one or more samples", value)
    return found


def same_length(name: str, value: Tensor, dim: int, of: str, count: int) -> None:
    """Raise a ValueError unless the field `name` has one entry for each entry of field `of` along a dimension."""
    if value.shape[dim] != count:
        got = tuple(value.shape)
        raise ValueError(f"{name} must have {count} entries along dimension {dim}, one for each of {of}, got {got}")
