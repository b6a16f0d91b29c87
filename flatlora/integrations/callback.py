"""FlatLoraCallback, for `transformers.Trainer` and trainers that derive from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..api import flat_parts
from ..config import check_rho
from ..training.checkpoint import METHOD
from ..training.distributed import is_divided
from ..training.perturbation import Perturbation
from ..utils.arguments import WrongType, batches, function, integer, refuse


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _check_loaded() -> None:
    """Check that every process has loaded the adapter of a checkpoint.

    Raises:
        RuntimeError: the adapter was loaded from a checkpoint that only the first process loads.
    """
    plugin = getattr(AcceleratorState(), "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1 and "FULL" in str(plugin.state_dict_type):
        raise RuntimeError(
            "fsdp_state_dict_type is FULL_STATE_DICT, and with FSDP1 peft loads the adapter of such a checkpoint in "
            "the first process only: the others would continue with a new one. Train with SHARDED_STATE_DICT or FSDP2; "
            "to keep this adapter, load the one in the checkpoint with flatlora.load and start a new run."
        )


class FlatLoraCallback(TrainerCallback, ExportableState):
    """Sets the progress of the noise from the trainer's step count, saves and resumes the noise, and logs its strength.

        Trainer(model, args, ..., callbacks=[FlatLoraCallback()])

    At the start of training it sets the length of the ramp, unless the configuration has `total_steps`. At each step it
    sets the progress, which is necessary where the optimizer's steps cannot be seen (FSDP1, DeepSpeed) and harmless
    elsewhere. The state of the noise is saved in `trainer_state.json`, so a resumed run continues with the same noise.

    The logs are in `log_history`, in the progress bar, and in the logs of every callback after this one. The callbacks
    of `report_to` (TensorBoard, W&B, MLflow, trackio, ...) come before those that are passed. `add_to` puts this one
    first, so that they have its curves too:

        trainer = Trainer(model, args, ...)
        FlatLoraCallback().add_to(trainer)

    With `sharpness_steps=k`, every k optimizer steps `flat_sharpness` and `flat_sharpness_stderr` are logged:
    `flatlora.analysis.expected_sharpness`, E L(W' + eps) - L(W') on the same batches and the same noise each time, in
    evaluation mode. It does not change the training. It costs 2 * sharpness_samples + 1 passes over the batches.

    Args:
        sharpness_steps: optimizer steps between two measurements; None for no measurement.
        sharpness_batches: the batches to measure on; a few held-out ones are enough.
        sharpness_loss: ``loss(model, batch)``, the mean loss of a batch; default ``model(**batch).loss``.
        sharpness_rho: strength of the noise; default the configuration's rho, 0.05 if that is 0.
        sharpness_samples: antithetic pairs of noise.

    Raises:
        ValueError: an argument out of bounds, or one of the two that belong together is missing.
    """

    def __init__(
        self,
        *,
        sharpness_steps: int | None = None,
        sharpness_batches: Iterable[Any] | None = None,
        sharpness_loss: Callable[[nn.Module, Any], Tensor] | None = None,
        sharpness_rho: float | None = None,
        sharpness_samples: int = 4,
    ) -> None:
        self._perturbations: list[Perturbation] = []  # several if parts of the model have different settings
        self._sharpness: dict[str, float] = {}  # measured, but not logged yet
        self._every = integer("sharpness_steps", sharpness_steps, 1, optional=True)
        self._samples = integer("sharpness_samples", sharpness_samples, 1)
        if (sharpness_steps is None) != (sharpness_batches is None):
            raise ValueError(
                "sharpness_steps and sharpness_batches belong together: how often to measure, and on what; "
                f"got sharpness_steps={sharpness_steps} and {'no ' if sharpness_batches is None else ''}batches"
            )
        self._rho = None if sharpness_rho is None else check_rho("sharpness_rho", sharpness_rho)
        if self._rho == 0:
            raise ValueError("sharpness_rho must be > 0, got 0; leave it out for the rho of the adapter")
        self._loss = function("sharpness_loss", sharpness_loss, expected="loss(model, batch)", optional=True)
        self._loss = self._loss or _model_loss
        self._batches = [] if sharpness_batches is None else batches("sharpness_batches", sharpness_batches)

    def add_to(self, trainer: Trainer) -> None:
        """Make this the first callback of a trainer, before its loggers; if it is in the list already, it is moved."""
        handler = getattr(trainer, "callback_handler", None)
        if not isinstance(getattr(handler, "callbacks", None), list):
            refuse("trainer", "a transformers.Trainer", trainer, WrongType)
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._perturbations, self._sharpness = flat_parts(model), {}
        if len(self._perturbations) > 1:
            for each in self._perturbations:  # parts that have trained alone are together in this run
                each.set_step(0)
            self._perturbations = flat_parts(model)
        callbacks: Any = state.stateful_callbacks  # a dict here, despite its annotation
        saved = callbacks.get(type(self).__name__)
        # an older checkpoint has no entry, but the trainer's saving expects one
        callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            _check_loaded()
        resumed = bool(state.global_step and isinstance(saved, dict) and saved.get("attributes"))
        if resumed:
            attributes = saved["attributes"]
            kept = [attributes.get("perturbation"), *attributes.get("others", [])]
            if len(kept) != len(self._perturbations):
                raise ValueError(
                    f"the checkpoint has the noise of {len(kept)} parts, and the model has {len(self._perturbations)}: "
                    "adapt the model as for the run that wrote the checkpoint"
                )
            for each, numbers in zip(self._perturbations, kept, strict=True):
                each.load_state_dict(numbers)
                self._load_tensors(each, **kwargs)
        for each in self._perturbations:
            step = each.steps if resumed else state.global_step  # without steps that a GradScaler has skipped
            total_steps = each.settings.total_steps
            each.set_step(step, state.max_steps if total_steps is None else total_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        for each in self._perturbations:
            method = each.settings.method
            if method.uses_gradients and not each.counts_steps:
                raise RuntimeError(
                    f"{type(method).__name__} needs to see the optimizer's step on the adapter's own parameters, and "
                    "here they are replaced (FSDP1). Use FSDP2, DeepSpeed, DDP or one process, or FlatLoraConfig."
                )
            if not each.counts_steps:
                each.set_step(state.global_step)
            if method.uses_gradients:
                self._save_tensors(each, **kwargs)
        if self._every is not None and self._perturbations and state.global_step % self._every == 0:
            self._sharpness = self._measure(model)
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._perturbations and logs is not None and "loss" in logs:
            ours = {"flat_rho": max(each.rho_t for each in self._perturbations), **self._sharpness}
            self._sharpness = {}
            logs.update(ours)
            if state.log_history:  # written before the callbacks are called
                state.log_history[-1].update(ours)

    def _measure(self, model: nn.Module) -> dict[str, float]:
        from ..analysis import expected_sharpness

        device = next(model.parameters()).device
        found = expected_sharpness(
            model,
            lambda model, batch: self._loss(model, send_to_device(batch, device)),
            self._batches,
            rho=self._rho or max(each.rho for each in self._perturbations) or 0.05,
            samples=self._samples,
            progress=False,
        )
        return {"flat_sharpness": found.mean.item(), "flat_sharpness_stderr": found.stderr.item()}

    def state(self) -> dict[str, Any]:
        if not self._perturbations:
            return {"args": {}, "attributes": {}}
        first, *others = (
            {name: value for name, value in each.state_dict().items() if name not in METHOD}
            for each in self._perturbations
        )
        return {"args": {}, "attributes": {"perturbation": first, **({"others": others} if others else {})}}

    def _save_tensors(self, perturbation: Perturbation, optimizer: Any, lr_scheduler: Any = None, **_: Any) -> None:
        """Tensors cannot be in the JSON file, so they are saved in the state of the optimizer.

        Where that does not hold them, they are saved in the state of the learning rate scheduler, which is the same
        in all processes.
        """
        known = perturbation.state_dict()
        kept = {name: known[name] for name in METHOD}
        anchor = perturbation.registry.first_factor()
        if anchor is None or not kept["tensors"]:
            return
        scheduler, number = _innermost(lr_scheduler), str(self._perturbations.index(perturbation))
        if _holds_tensors(optimizer, anchor):
            optimizer.state[anchor]["flatlora"] = kept
            getattr(scheduler, "flatlora", {}).pop(number, None)
            return
        if scheduler is not None:
            vars(scheduler).setdefault("flatlora", {})[number] = kept
        if scheduler is None or "flatlora" not in scheduler.state_dict():
            perturbation.diagnostics.warn_once(
                f"the checkpoints of this run do not have the state of {type(perturbation.settings.method).__name__}: "
                f"the state of the optimizer cannot hold it, and {type(scheduler).__name__}.state_dict() does not. Use "
                "a scheduler of torch, or save perturbation(model).state_dict() with each checkpoint."
            )

    def _load_tensors(
        self, perturbation: Perturbation, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        anchor = perturbation.registry.first_factor()
        if anchor is None:
            return
        number = str(self._perturbations.index(perturbation))
        kept = getattr(_innermost(lr_scheduler), "flatlora", {}).get(number)
        if kept is None and optimizer is not None and not is_divided(anchor):
            kept = optimizer.state.get(anchor, {}).pop("flatlora", None)
        if kept is not None:
            perturbation.load_state_dict({**perturbation.state_dict(), **kept})


def _innermost(lr_scheduler: Any) -> Any:
    """The scheduler that accelerate wraps."""
    return getattr(lr_scheduler, "scheduler", lr_scheduler)


def _holds_tensors(optimizer: Any, anchor: nn.Parameter) -> bool:
    """Whether tensors can be saved in the state of the optimizer for this factor.

    They cannot if there is none (SGD without momentum), or if the factors are divided among processes (FSDP, ZeRO):
    then the state is divided in a way of its own.
    """
    return not is_divided(anchor) and bool(optimizer.state.get(anchor))
