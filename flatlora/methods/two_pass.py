"""Methods with two passes per step, as SAM: the first finds the perturbation, the second takes the gradient there.

with ascent(model):
    loss(model, batch).backward()      # at (A, B); the perturbation is computed from these gradients
loss(model, batch).backward()          # at (A + E_A, B + E_B)
optimizer.step()                       # from (A, B)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim import Optimizer

from ..utils.arguments import boolean, shown
from .base import FactorOffset, MethodState, TrainingRun


class FirstPass(MethodState):
    """Whether the first pass has been made for the coming optimizer step."""

    def __init__(self) -> None:
        self.done = False

    def state_dict(self) -> dict[str, Any] | None:
        return {"done": True} if self.done else None

    def check(self, state: Any, shapes: Collection[tuple[int, ...]]) -> dict[str, Any] | None:
        if state is None:
            return None
        if not isinstance(state, Mapping) or [*state] != ["done"]:
            raise ValueError(f"method must be None or have one entry 'done', got {shown(state)}")
        return {"done": boolean("method['done']", state["done"])}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.done = state is not None and state["done"]


@dataclass(frozen=True)
class TwoPass(FactorOffset):
    """A method whose perturbation comes from a first pass over the same data, inside `flatlora.ascent(model)`."""

    passes: ClassVar[int] = 2

    def make_state(self) -> FirstPass:
        return FirstPass()

    def ascend(self, run: TrainingRun) -> None:
        """Set `layer.offsets` from the gradients of the first pass."""
        raise NotImplementedError

    def before_step(self, run: TrainingRun, optimizer: Optimizer) -> None:
        if run.rho > 0 and not run.method_state.done:
            raise RuntimeError(
                f"{type(self).__name__} takes two passes, and this optimizer step had one: run the first backward "
                "inside `with flatlora.ascent(model):`, or give your Trainer class TwoPassTrainerMixin"
            )

    def after_step(self, run: TrainingRun, optimizer: Optimizer) -> None:
        self.forget(run)

    def forget(self, run: TrainingRun) -> None:
        """Remove the perturbation."""
        run.method_state.done = False
        for _, layer in run.flat_layers():
            layer.offsets.clear()
