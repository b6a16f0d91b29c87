"""The two passes of SAM: the first finds where the loss is high, the second takes the gradient there.

with ascent(model):
    loss(model, batch).backward()      # at (A, B); these gradients make the perturbation and are dropped
loss(model, batch).backward()          # at (A + E_A, B + E_B)
optimizer.step()                       # from (A, B)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..model import perturbation
from .factors import FactorMethod

# TRL's trainers whose training step generates
GENERATING = {
    *(
        "AsyncDistillationTrainer",
        "AsyncGRPOTrainer",
        "DistillationTrainer",
        "GKDTrainer",
        "GOLDTrainer",
        "GRPOTrainer",
    ),
    *("IWOPDTrainer", "OnlineDPOTrainer", "RLOOTrainer", "SDFTTrainer", "SDPOTrainer"),
}
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class TwoPass(FactorMethod):
    """A method whose perturbation comes from a first pass over the same data, made inside `ascent(model)`."""

    passes = 2

    def ascend(self, state: Any) -> None:
        """Set `layer.offsets` from the gradients that the first pass has left."""
        raise NotImplementedError

    def before_step(self, state: Any, optimizer: Optimizer) -> None:
        if state.rho > 0 and not state.ascended:
            raise RuntimeError(
                f"{type(self).__name__} takes two passes, and this optimizer step had one: make the first backward "
                "inside `with flatlora.ascent(model):`, or give your Trainer class TwoPassTrainerMixin"
            )

    def after_step(self, state: Any, optimizer: Optimizer) -> None:
        forget(state)


def forget(state: Any) -> None:
    """Back to (A, B)."""
    state.ascended = False
    for _, layer in state.flat_layers():
        layer.offsets.clear()


@contextmanager
def ascent(model: nn.Module) -> Iterator[None]:
    """Context manager: the first pass of FMLoRA and LoRA-SAM. Backwards inside are at (A, B), those after it, until the
    optimizer's step, at the perturbed factors.

    Nothing else is left of the pass: `.grad` is what it was, the generators of torch are (so that both passes have the
    same dropout masks, and rho = 0 is plain LoRA), and so are the statistics of batch normalisation. Under
    accumulation either give each micro-batch its own first pass, or make the first pass of all of them in one `with`
    and then the second of all of them. Under DDP gradients of the first pass are not averaged: each process perturbs
    by its own batch, as is usual for SAM. The scale of a GradScaler cancels.

    Args:
        model: a model with an `FMLoraConfig` or a `LoraSamConfig`, bare or wrapped (DDP, compiled).

    Raises:
        ValueError: the model has no flat layer.
        TypeError: its method makes one pass.
        RuntimeError: there was no backward inside, or the adapter is sharded (FSDP, ZeRO).
    """
    state = perturbation(model)
    method = state.settings.method
    if not isinstance(method, TwoPass):
        raise TypeError(f"ascent is for methods with two passes, and {type(method).__name__} has one")
    state.refuse_shards(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p.grad for p in parameters]
    buffers = [b for m in model.modules() if isinstance(m, BATCH_NORMS) for b in m.buffers(recurse=False)]
    statistics = [b.clone() for b in buffers]
    forget(state)
    for p in parameters:
        p.grad = None
    try:
        with torch.random.fork_rng(_devices(parameters)), getattr(model, "no_sync", nullcontext)():
            yield
        if all(p.grad is None for p in parameters):
            raise RuntimeError("there was no backward inside `with ascent(model):`")
        with torch.no_grad():
            method.ascend(state)
        state.ascended = True
    finally:
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad
        with torch.no_grad():
            for buffer, before in zip(buffers, statistics, strict=True):
                buffer.copy_(before)


def _devices(parameters: list[nn.Parameter]) -> list[torch.device]:
    """Accelerators whose generators the pass may use."""
    return sorted({p.device for p in parameters if p.device.type == "cuda"}, key=str)


class TwoPassTrainerMixin:
    """Both passes in each `training_step` of a `transformers.Trainer` subclass, the first one without
    synchronisation. Under accumulation each micro-batch has its own first pass.

        class SamTrainer(TwoPassTrainerMixin, Trainer): ...

    Raises:
        TypeError: the trainer makes the data of a step in the step, so that two passes would see different data: TRL's
            GRPOTrainer and the others that generate.
        RuntimeError: under DeepSpeed, which steps the optimizer in its backward.
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
        if self.is_deepspeed_enabled:
            raise RuntimeError(
                "two passes do not work with DeepSpeed, which steps the optimizer in its backward: use DDP or one "
                "process, or EFMLoraConfig, which makes one pass"
            )
        with ascent(model):
            super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
