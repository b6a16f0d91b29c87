"""One run: an adapter trained by transformers' Trainer, which goes on from its last checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import flatlora

from .arguments import RecipeArguments, optimizer_steps
from .processes import count


def training_arguments(args: RecipeArguments, folder: Path, seed: int, examples: int, **more: Any) -> dict[str, Any]:
    """The arguments of `TrainingArguments`, which those of TRL's trainers contain, for one run.

    Args:
        folder: of the run; checkpoints go there.
        examples: of the training data, from which the steps of the warm-up are counted.
        more: put in place of ours.

    Raises:
        ValueError: the processes cannot share the batch of an optimizer step.
    """
    world = count()
    micro = args.micro_batch_size or max(1, args.batch_size // world)
    if args.batch_size % (micro * world):
        raise ValueError(
            f"--batch_size must be a multiple of --micro_batch_size times the processes, {micro} * {world}, "
            f"got {args.batch_size}"
        )
    steps = optimizer_steps(args, examples)
    more = {"gradient_checkpointing": True, **more} if args.gradient_checkpointing else more
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": args.batch_size // (micro * world),
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "label_smoothing_factor": args.label_smoothing,
        "lr_scheduler_type": args.lr_scheduler_type,
        "warmup_steps": args.warmup_steps or math.ceil(args.warmup_ratio * steps),
        "save_steps": args.save_steps,
        "save_total_limit": 1,
        "logging_steps": max(1, steps // 50),
        # the mean of a classifier's loss knows no tokens, and would be multiplied by the number of processes
        "average_tokens_across_devices": False,
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),  # FSDP2 must be told
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "seed": seed,
        **more,
    }


def two_passes(model: PeftModel) -> bool:
    """Whether the method of a flat model has a second pass per step."""
    return flatlora.perturbation(model).settings.method.passes == 2


def trainer_class(kind: type[Trainer], model: PeftModel, method: str) -> type[Trainer]:
    """`kind`, with the second pass if the method has one."""
    if method == "lora" or not two_passes(model):
        return kind
    return type(kind.__name__, (flatlora.TwoPassTrainerMixin, kind), {})


def callbacks(method: str) -> list[Any]:
    """For a Trainer of this method."""
    return [] if method == "lora" else [flatlora.FlatLoraCallback()]


def fit(
    model: PeftModel,
    method: str,
    args: RecipeArguments,
    folder: Path,
    seed: int,
    train: Any,
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    kind: type[Trainer] = Trainer,
    **more: Any,
) -> dict[str, float]:
    """Train the adapter and save it in `folder`/adapter.

    Args:
        train: training examples, what a data loader takes.
        collate: makes a batch of examples.
        more: further arguments of `TrainingArguments`.

    Returns:
        mean training loss, seconds, optimizer steps.
    """
    options = training_arguments(args, folder, seed, len(train), remove_unused_columns=False, **more)
    made = trainer_class(kind, model, method)(
        model, TrainingArguments(**options), data_collator=collate, train_dataset=train, callbacks=callbacks(method)
    )
    return finish(made, folder)


def finish(trainer: Trainer, folder: Path) -> dict[str, float]:
    """Train, from the last checkpoint of `folder` if there is one, and save the adapter and the history."""
    start = time.perf_counter()
    done = trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    seconds = time.perf_counter() - start
    if trainer.is_fsdp_enabled:  # the adapter is saved whole, whatever the checkpoints are
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "adapter"))
    trainer.save_state()
    return {"train_loss": done.training_loss, "train_seconds": round(seconds, 1), "steps": trainer.state.global_step}
