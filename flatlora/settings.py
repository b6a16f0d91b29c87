"""How the noise of a model is scheduled and drawn: the settings that its layers share, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .method import FlatLora, Method
from .ops import BACKENDS
from .utils.arguments import INT64, SEED, check_fields, checker, choice, integer, number

RAMPS: dict[str, Callable[[float, int], float]] = {  # of the progress t in [0, 1] and of the steps made
    "cosine": lambda t, steps: 0.5 * (1 - math.cos(math.pi * t)),
    "linear": lambda t, steps: t,
    "constant": lambda t, steps: 1.0,
    "cosine_decay": lambda t, steps: 0.5 * (1 + math.cos(math.pi * t)),
    "linear_decay": lambda t, steps: 1 - t,
    "inverse_sqrt": lambda t, steps: 1 / math.sqrt(1 + steps),
}
NEED_NO_LENGTH = ("constant", "inverse_sqrt")
LARGEST_RHO = 1e6  # noise a million times the weight: beyond that products overflow, and the loss is NaN


def check_rho(name: str, value: Any) -> float:
    """A strength as a float, or an error: it must be a finite number >= 0."""
    number(name, value, low=0, expected="finite and >= 0", hint="; 0 means plain LoRA, 0.05 to 0.10 is usual")
    return number(name, value, high=LARGEST_RHO, expected=f"at most {LARGEST_RHO:g}", hint="; 0.05 to 0.10 is usual")


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "rho": check_rho,
    "schedule": checker(choice, tuple(RAMPS)),
    "total_steps": checker(integer, 1, INT64, optional=True),
    "resample": checker(choice, ("forward", "step")),
    "seed": checker(integer, *SEED, optional=True),
    "backend": checker(choice, ("auto", *BACKENDS)),
    "on_unsupported": checker(choice, ("error", "warn"), "'error' or 'warn'"),
}


def setting(name: str, default: Any) -> Any:
    """A dataclass field with the check of this setting."""
    return field(default=default, metadata={"check": CHECKS[name]})


@dataclass(frozen=True)
class Settings:
    """How the noise is scheduled and drawn. Checked at construction; the fields are those of `FlatLoraConfig`."""

    schedule: str = setting("schedule", "cosine")
    total_steps: int | None = setting("total_steps", None)
    resample: str = setting("resample", "forward")
    seed: int | None = setting("seed", None)
    backend: str = setting("backend", "auto")
    method: Method = FlatLora()

    def __post_init__(self) -> None:
        check_fields(self)
