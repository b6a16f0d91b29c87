"""The processes of `accelerate launch` or `torchrun`; without one of these there is one process."""

from __future__ import annotations

import os

from accelerate import PartialState


def state() -> PartialState:
    """accelerate's state of the processes, on the devices that `transformers.TrainingArguments` will choose."""
    return PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"))


def count() -> int:
    """How many processes train together."""
    return state().num_processes


def is_main() -> bool:
    """Whether this process prints and writes."""
    return state().is_main_process
