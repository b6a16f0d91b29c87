"""How the noise of a model is scheduled and drawn: the settings that its layers share, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .method import FlatLora, Method
from .ops import BACKENDS

RAMPS: dict[str, Callable[[float, int], float]] = {  # of the progress t in [0, 1] and of the steps made
    "cosine": lambda t, steps: 0.5 * (1 - math.cos(math.pi * t)),
    "linear": lambda t, steps: t,
    "constant": lambda t, steps: 1.0,
    "cosine_decay": lambda t, steps: 0.5 * (1 + math.cos(math.pi * t)),
    "linear_decay": lambda t, steps: 1 - t,
    "inverse_sqrt": lambda t, steps: 1 / math.sqrt(1 + steps),
}
NEED_NO_LENGTH = ("constant", "inverse_sqrt")
RESAMPLE = ("forward", "step")
BOUNDS = {"total_steps": (1, 2**63 - 1), "seed": (-(2**63), 2**64 - 1)}


def check_number(name: str, value: Any) -> float:
    """A real number of any kind (NumPy's too) as a float, or an error."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    return float(value)


def check_rho(rho: Any) -> float:
    """`rho` as a float, or an error: it must be a finite number >= 0."""
    rho = check_number("rho", rho)
    if not math.isfinite(rho) or rho < 0:
        raise ValueError(f"rho must be finite and >= 0, got {rho}; 0 means plain LoRA, 0.05 to 0.10 is usual")
    return rho


@dataclass(frozen=True)
class Settings:
    """How the noise is scheduled and drawn. Checked at construction; the fields are those of `FlatLoraConfig`."""

    schedule: str = "cosine"
    total_steps: int | None = None
    resample: str = "forward"
    seed: int | None = None
    backend: str = "auto"
    method: Method = FlatLora()

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, tuple(RAMPS))
        _check_choice("resample", self.resample, RESAMPLE)
        _check_choice("backend", self.backend, ("auto", *BACKENDS))
        for name, bounds in BOUNDS.items():
            object.__setattr__(self, name, check_integer(name, getattr(self, name), *bounds))


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def check_integer(name: str, value: Any, low: int, high: int, optional: bool = True) -> Any:
    """An integer of any kind (NumPy's too) in these bounds as an int, or None where it is optional, or an error."""
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        or_none = " or None" if optional else ""
        raise TypeError(f"{name} must be an integer{or_none}, got {value!r} of type {type(value).__name__}")
    if not low <= int(value) <= high:
        raise ValueError(f"{name} must be {'None or ' if optional else ''}in [{low}, {high}], got {value}")
    return int(value)


class Integer:
    """An attribute that is checked when it is set, by `check_integer`."""

    def __init__(self, low: int, high: int, optional: bool = False) -> None:
        self.bounds = low, high, optional

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type) -> Any:
        return owner.__dict__[self.name]

    def __set__(self, owner: Any, value: Any) -> None:
        owner.__dict__[self.name] = check_integer(self.name, value, *self.bounds)
