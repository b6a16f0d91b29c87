"""Two passes per step in a `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..api import ascent

# TRL's trainers whose training step generates
GENERATING = {
    *("AsyncDistillationTrainer", "AsyncGRPOTrainer", "DistillationTrainer", "GKDTrainer", "GOLDTrainer"),
    *("GRPOTrainer", "IWOPDTrainer", "OnlineDPOTrainer", "RLOOTrainer", "SDFTTrainer", "SDPOTrainer"),
}


class TwoPassTrainerMixin:
    """Runs both passes of FMLoRA and LoRA-SAM in each `training_step` of a `transformers.Trainer` subclass.

    Under DDP the first pass is not synchronized between processes, see `flatlora.ascent`. With gradient accumulation
    each micro-batch has its own first pass.

        class SamTrainer(TwoPassTrainerMixin, Trainer): ...

    Raises:
        TypeError: the trainer generates the data of a step in the step, so that two passes would see different data
            (TRL's GRPOTrainer and others).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        generating = [kind.__name__ for kind in cls.__mro__ if kind.__name__ in GENERATING]
        if generating:
            raise TypeError(
                f"{cls.__name__}: {generating[0]} generates the data of a training step in the step itself, and the "
                "two passes of TwoPassTrainerMixin need the same data. Use a method of one pass, such as EFMLoraConfig."
            )

    def training_step(self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        # super() is a Trainer, which the type of a mix-in does not say
        with ascent(model):
            super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc,no-any-return]
