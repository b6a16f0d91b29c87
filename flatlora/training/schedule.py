"""The strength of the noise: rho, and the progress of the run, from which the schedule computes rho_t."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from ..config import NEED_NO_LENGTH, check_rho
from ..utils.arguments import INT64, Checked, integer, number
from ..utils.copying import PartlyCopied, no_object

RAMPS: dict[str, Callable[[float, int], float]] = {  # of the progress t in [0, 1] and of the number of steps
    "cosine": lambda t, steps: 0.5 * (1 - math.cos(math.pi * t)),
    "linear": lambda t, steps: t,
    "constant": lambda t, steps: 1.0,
    "cosine_decay": lambda t, steps: 0.5 * (1 + math.cos(math.pi * t)),
    "linear_decay": lambda t, steps: 1 - t,
    "inverse_sqrt": lambda t, steps: 1 / math.sqrt(1 + steps),
}


class StepCounter:
    """The number of optimizer steps made. A DeepSpeed engine counts its own."""

    def __init__(self, counted: int = 0) -> None:
        self._counted = counted
        self._engine: Callable[[], Any] = no_object

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine, or None."""
        return self._engine()

    @property
    def steps(self) -> int:
        return self._counted + self._engine_steps()

    @steps.setter
    def steps(self, value: int) -> None:
        self._counted = value - self._engine_steps()

    def follow(self, engine: Any) -> None:
        """Let a DeepSpeed engine count from now on."""
        steps = self.steps
        self._engine = weakref.ref(engine)
        self.steps = steps

    def _engine_steps(self) -> int:
        engine = self._engine()
        return 0 if engine is None else engine.global_steps - engine.skipped_steps

    def __reduce__(self) -> tuple[Any, ...]:
        return StepCounter, (self.steps,)


class Schedule(PartlyCopied):
    """``rho_t = rho * ramp(progress)``, where `progress` is the number of optimizer steps over `total_steps`.

    Args:
        kind: name of the ramp.
        total_steps: length of the run in optimizer steps, None if unknown.
    """

    total_steps: int | None = Checked(integer, 1, INT64, optional=True)

    def __init__(self, kind: str, total_steps: int | None) -> None:
        self.kind = kind
        self.total_steps = total_steps
        self.rhos: dict[str, float] = {}  # by adapter
        self.counter = StepCounter()
        self.origin = (0.0, 0)  # progress, and the step at which it was set
        self._warned = False

    @property
    def rho(self) -> float:
        """The largest strength of the flat adapters."""
        return max(self.rhos.values(), default=0.0)

    @rho.setter
    def rho(self, value: float) -> None:
        value = check_rho("rho", value)
        self.rhos = dict.fromkeys(self.rhos, value)

    @property
    def ramp(self) -> float:
        """The ramp at the current progress, in [0, 1]; 1 if the length of the run is not known."""
        if self.kind not in NEED_NO_LENGTH and self._length_unknown():
            return 1.0
        return RAMPS[self.kind](self.progress, self.counter.steps)

    @property
    def progress(self) -> float:
        """The part of the run that is over, in [0, 1]."""
        start, at = self.origin
        done = (self.counter.steps - at) / self.total_steps if self.total_steps else 0.0
        return min(1.0, start + done)

    @progress.setter
    def progress(self, value: float) -> None:
        self.origin = (number("progress", value, 0, 1, expected="a number in [0, 1]"), self.counter.steps)

    def ramps_by_steps(self) -> bool:
        """Whether rho_t depends on the number of optimizer steps."""
        follows_steps = self.kind in NEED_NO_LENGTH or self.total_steps is not None
        return self.kind != "constant" and follows_steps and self.origin == (0.0, 0)

    def warn_of_unknown_length(self) -> None:
        """Warn, once, if the ramp needs the length of the run and it is not known."""
        if self._length_unknown() and self.kind not in NEED_NO_LENGTH and not self._warned:
            self._warned = True
            warnings.warn(
                f"schedule={self.kind!r} needs the length of the run: total_steps is None, so rho stays at {self.rho} "
                "throughout. Pass total_steps (optimizer steps), or use FlatLoraCallback in a Trainer, or "
                "schedule='constant'.",
                stacklevel=2,
            )

    def _length_unknown(self) -> bool:
        return self.total_steps is None and self.origin == (0.0, 0)
