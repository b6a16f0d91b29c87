"""Methods with two passes per step, as SAM: the first finds the perturbation, the second takes the gradient there.

with ascent(model):
    loss(model, batch).backward()      # at (A, B); the perturbation is computed from these gradients
loss(model, batch).backward()          # at (A + E_A, B + E_B)
optimizer.step()                       # from (A, B)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.optim import Optimizer

from .base import FactorOffset, MethodState, TrainingRun


class FirstPass(MethodState):
    """Whether the first pass has been made for the coming optimizer step."""

    def __init__(self) -> None:
        self.done = False


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
