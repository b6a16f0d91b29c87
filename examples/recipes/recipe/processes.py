"""The processes of `accelerate launch` or `torchrun`; without one of these there is one process."""

from __future__ import annotations

from accelerate import PartialState


def count() -> int:
    """How many processes train together."""
    return PartialState().num_processes


def is_main() -> bool:
    """Whether this process prints and writes."""
    return PartialState().is_main_process
