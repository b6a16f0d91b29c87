"""FlatLoraCallback, for `transformers.Trainer` and the trainers built on it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .model import perturbation
from .state import Perturbation


class FlatLoraCallback(TrainerCallback, ExportableState):
    """Gives the noise the trainer's own step count, carries it through checkpoints, and logs `flat_rho`.

        Trainer(model, args, ..., callbacks=[FlatLoraCallback()])

    At the start of training it sets the length of the ramp, unless the config has `total_steps`. At each step it sets
    the progress, which is needed where the library cannot see the optimizer's steps (FSDP1, DeepSpeed) and harmless
    elsewhere. The noise's state is kept in `trainer_state.json`, so that a resumed run goes on with the same noise.

    `flat_rho` is in `log_history`, in the progress bar, and in the logs of every callback that comes after this one.
    Those of `report_to` come before it, whatever is passed. To have the curve there, pass that callback instead:

        TrainingArguments(..., report_to="none")
        Trainer(model, args, ..., callbacks=[FlatLoraCallback(), TensorBoardCallback()])
    """

    def __init__(self) -> None:
        self._perturbation: Perturbation | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._perturbation = perturbation(model)
        callbacks: Any = state.stateful_callbacks  # a dict by now, whatever its annotation says
        # a checkpoint from before this callback has no entry, and the trainer's own saving expects one
        saved = callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step and isinstance(saved, dict) and saved.get("attributes"):
            self._perturbation.load_state_dict(saved["attributes"]["perturbation"])
        total_steps = self._perturbation.settings.total_steps
        self._perturbation.set_step(state.global_step, state.max_steps if total_steps is None else total_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._perturbation is not None:
            self._perturbation.set_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._perturbation is not None:
            self._perturbation.set_step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._perturbation is not None and logs is not None and "loss" in logs:
            logs["flat_rho"] = self._perturbation.rho_t
            if state.log_history:  # written before the callbacks are asked
                state.log_history[-1]["flat_rho"] = self._perturbation.rho_t

    def state(self) -> dict[str, Any]:
        attributes = {} if self._perturbation is None else {"perturbation": self._perturbation.state_dict()}
        return {"args": {}, "attributes": attributes}
