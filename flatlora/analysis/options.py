"""The checks of arguments and results that are the analysis' own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..utils.arguments import SEED, WrongType, checker, choice, integer, number, numbers, refuse, scalar, tensor, text

NOISES = ("filter", "filter_normalised", "layer", "plain")
SPACES = ("merged", "adapter")


def check_seed(name: str, value: Any) -> int:
    """Any 64-bit integer."""
    return integer(name, value, *SEED, expected="an integer of 64 bits" if _is_whole(value) else "an integer")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_level(name: str, value: Any) -> float:
    """The probability of an interval."""
    return number(name, value, 0, 1, above=True, below=True, expected="in (0, 1)")


def strengths(name: str, values: Any) -> Tensor:
    """One or more strengths, finite and not negative, as float64, (count,)."""
    return numbers(name, values, low=0)


def grid(name: str, values: Any) -> Tensor:
    """Distances as float64, (points,); the middle of a linspace is the centre."""
    found = numbers(name, values, expected="at least one finite number")
    return torch.where(found.abs() < 1e-6 * found.abs().max(), 0.0, found)


def check_norms(name: str, value: Any) -> Any:
    """Row norms by layer name, or None."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        refuse(name, "None or a mapping of layer names to row norms, as merged_row_norms makes", value, WrongType)
    for layer, norms in value.items():
        tensor(f"{name}[{layer!r}]", norms)
    return value


def operator(name: str, value: Any) -> Any:
    """A symmetric matrix known by its products, not a tensor."""
    known = all(hasattr(value, part) for part in ("size", "dtype", "device", "__matmul__"))
    known = known and isinstance(value.dtype, torch.dtype) and not isinstance(value, type)
    if not known or not _is_whole(value.size):
        refuse(name, "an operator: a Hessian, or an object with size, dtype, device and @", value, WrongType)
    return value


# ---- results ----


def real(name: str, value: Any) -> float:
    """Any real number; the loss of a model that has diverged is NaN."""
    plain = scalar(value)
    if isinstance(plain, bool) or not isinstance(plain, Real):
        refuse(name, "a number", value, WrongType)
    try:
        return float(plain)
    except OverflowError:  # an integer beyond the largest float
        refuse(name, "a number that a float can hold", value)


def result(check: Any, *args: Any, default: Any = ..., **kwargs: Any) -> Any:
    """A field of a result, checked when the result is made: by a measurement, from a file or by hand."""
    given = {} if default is ... else {"default": default}
    return field(**given, metadata={"check": checker(check, *args, **kwargs)})


def points() -> Any:
    return result(_points)


def _points(name: str, value: Any) -> Tensor:
    if not torch.isfinite(tensor(name, value, dims=1)).all() or not len(value):
        refuse(name, "one or more finite numbers", value)
    return value


def samples() -> Any:
    return result(_samples)


def _samples(name: str, value: Any) -> Tensor:
    if not tensor(name, value, dims=2).numel():
        refuse(name, "one or more samples", value)
    return value


def how(name: str) -> Any:
    """How a result was measured: its noise, space or seed."""
    return {
        "noise": result(choice, NOISES),
        "space": result(choice, SPACES),
        "seed": result(check_seed),
        "text": result(text),
        "number": result(real),
    }[name]


def same_length(name: str, value: Tensor, dim: int, of: str, count: int) -> None:
    """Raise unless the result `name` has an entry for each of `of` along a dimension."""
    if value.shape[dim] != count:
        got = tuple(value.shape)
        raise ValueError(f"{name} must have {count} entries along dimension {dim}, one for each of {of}, got {got}")


def above_zero(name: str, value: Any, optional: bool = False) -> Any:
    """A finite number > 0."""
    return number(name, value, 0, above=True, optional=optional, expected="a finite number > 0")
