"""How the noise of a model is scheduled and drawn: the settings that its layers share, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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


def check_rho(rho: Any) -> float:
    """`rho` as a float, or an error: it must be a finite number >= 0."""
    if isinstance(rho, bool) or not isinstance(rho, (int, float)):
        raise TypeError(f"rho must be a number, got {rho!r} of type {type(rho).__name__}")
    if not math.isfinite(rho) or rho < 0:
        raise ValueError(f"rho must be finite and >= 0, got {rho}; 0 means plain LoRA, 0.05 to 0.10 is usual")
    return float(rho)


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
        check_integer("total_steps", self.total_steps, 1, 2**63 - 1)
        check_integer("seed", self.seed, -(2**63), 2**64 - 1)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    """An integer in these bounds, or None; anything else is an error."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer or None, got {value!r} of type {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be None or in [{low}, {high}], got {value}")
