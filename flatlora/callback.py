"""FlatLoraCallback, for `transformers.Trainer` and the trainers built on it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .model import perturbation
from .state import Perturbation

TENSORS = ("tensors", "climber")  # what of a perturbation's state is no number


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
            self._load_from_optimizer(kwargs.get("optimizer"))
        total_steps = self._perturbation.settings.total_steps
        self._perturbation.set_step(state.global_step, state.max_steps if total_steps is None else total_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._perturbation is not None:
            self._perturbation.set_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._perturbation is not None:
            method = self._perturbation.settings.method
            if method.uses_gradients and not self._perturbation.sees_steps:
                raise RuntimeError(
                    f"{type(method).__name__} needs to see the optimizer's step on the adapter's own parameters, and "
                    "here they are replaced (FSDP1, DeepSpeed). Use DDP or one process, or FlatLoraConfig."
                )
            self._perturbation.set_step(state.global_step)
            if method.uses_gradients:
                self._save_in_optimizer(kwargs["optimizer"])

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
        if self._perturbation is None:
            return {"args": {}, "attributes": {}}
        known = self._perturbation.state_dict()
        numbers = {name: value for name, value in known.items() if name not in TENSORS}
        return {"args": {}, "attributes": {"perturbation": numbers}}

    def _save_in_optimizer(self, optimizer: Any) -> None:
        """Tensors do not go into a JSON file; the optimizer's state is saved beside it, and they ride along."""
        assert self._perturbation is not None
        known = self._perturbation.state_dict()
        kept = {name: known[name] for name in TENSORS}
        anchor = self._perturbation.anchor()
        if kept["tensors"] and anchor is not None and optimizer.state.get(anchor):
            optimizer.state[anchor]["flatlora"] = kept

    def _load_from_optimizer(self, optimizer: Any) -> None:
        assert self._perturbation is not None
        anchor = self._perturbation.anchor()
        kept = None if optimizer is None or anchor is None else optimizer.state.get(anchor, {}).pop("flatlora", None)
        if kept is not None:
            self._perturbation.load_state_dict({**self._perturbation.state_dict(), **kept})
