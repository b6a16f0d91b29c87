"""Leave the global random states as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def preserved_rng(devices: Iterable[torch.device] | None = None) -> Iterator[None]:
    """Restore the random states of torch, NumPy and Python on exit, bit for bit.

    Args:
        devices: the CUDA devices, beside the CPU; default all, if any is in use.
    """
    found: list[Any] = list(devices or ())
    if devices is None and _is_cuda_in_use():
        found = list(range(torch.cuda.device_count()))
    numpy = sys.modules.get("numpy")
    own, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=found):
            yield
    finally:
        random.setstate(own)
        if numpy:
            numpy.random.set_state(arrays)


def _is_cuda_in_use() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch's
