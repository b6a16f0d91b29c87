"""Leave the global random states as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def preserved_rng(devices: Iterable[torch.device]) -> Iterator[None]:
    """Restore the random states of torch (the CPU and these CUDA devices), NumPy and Python on exit, bit for bit."""
    numpy = sys.modules.get("numpy")
    own, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(own)
        if numpy:
            numpy.random.set_state(arrays)
