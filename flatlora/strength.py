"""How strong the noise of a model is: rho, and the place in the run, which the schedule turns into rho_t."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from .settings import NEED_NO_LENGTH, RAMPS, Settings, check_rho
from .utils.arguments import INT64, Checked, integer, number


class Strength:
    """``rho_t = rho * ramp(progress)``; `progress` is optimizer steps made over `total_steps`."""

    total_steps = Checked(integer, 1, INT64, optional=True)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._engine_ref: Callable[[], Any] = lambda: None  # the DeepSpeed engine that makes the steps, weakly
        self.rhos: dict[str, float] = {}
        self.total_steps = settings.total_steps
        self._counted = 0  # steps, without those that a DeepSpeed engine counts
        self._origin = (0.0, 0)  # progress, and the step it was set at
        self._warned = False

    @property
    def _engine(self) -> Any:
        return self._engine_ref()

    @property
    def steps(self) -> int:
        return self._counted + self._engine_steps()

    @steps.setter
    def steps(self, value: int) -> None:
        self._counted = value - self._engine_steps()

    @property
    def rho(self) -> float:
        """Strength; with several flat adapters of different strength, the largest. Setting it sets all."""
        return max(self.rhos.values(), default=0.0)

    @rho.setter
    def rho(self, value: float) -> None:
        value = check_rho("rho", value)
        self.rhos = dict.fromkeys(self.rhos, value)

    @property
    def rho_t(self) -> float:
        """``rho * ramp(progress)``, the strength now."""
        return self.rho * self.ramp

    @property
    def ramp(self) -> float:
        """The schedule at the current progress, in [0, 1]; 1 when the length of the run is not known."""
        schedule = self.settings.schedule
        if schedule not in NEED_NO_LENGTH and self._length_unknown():
            return 1.0
        return RAMPS[schedule](self.progress, self.steps)

    @property
    def progress(self) -> float:
        """Part of the run that is behind us, 0 to 1: optimizer steps over `total_steps`, or as set."""
        start, at = self._origin
        done = (self.steps - at) / self.total_steps if self.total_steps else 0.0
        return min(1.0, start + done)

    @progress.setter
    def progress(self, value: float) -> None:
        self._origin = (number("progress", value, 0, 1, expected="a number in [0, 1]"), self.steps)

    def set_step(self, step: int, total_steps: int | None = None) -> None:
        """Say which optimizer step the run is at, where the library cannot count (FSDP1, DeepSpeed) or has resumed."""
        step = integer("step", step, 0, INT64)
        if total_steps is not None:
            self.total_steps = total_steps
        self._origin = (0.0, 0)
        if step != self.steps:
            self.steps = step
            self._after_step()

    def _after_step(self) -> None:
        """The number of steps has changed."""

    def _engine_steps(self) -> int:
        return 0 if self._engine is None else self._engine.global_steps - self._engine.skipped_steps

    def _warn_of_length(self) -> None:
        if self._length_unknown() and self.settings.schedule not in NEED_NO_LENGTH and not self._warned:
            self._warned = True
            warnings.warn(
                f"schedule={self.settings.schedule!r} needs the length of the run: total_steps is None, so rho stays "
                f"at {self.rho} throughout. Pass total_steps (optimizer steps), or use FlatLoraCallback in a Trainer, "
                "or schedule='constant'.",
                stacklevel=2,
            )

    def needs_steps(self) -> bool:
        """Does anything depend on the number of optimizer steps made?"""
        schedule = self.settings.schedule
        ramps = schedule != "constant" and (schedule in NEED_NO_LENGTH or self.total_steps is not None)
        by_steps = self.settings.resample == "step" or self.settings.method.uses_gradients
        return self.rho > 0 and (by_steps or (ramps and self._origin == (0.0, 0)))

    def _length_unknown(self) -> bool:
        return self.total_steps is None and self._origin == (0.0, 0)
