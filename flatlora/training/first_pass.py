"""The first pass of a method with two passes: compute the perturbation, and leave nothing else behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from ..methods.two_pass import TwoPass
from .perturbation import Perturbation

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


@contextmanager
def first_pass(model: nn.Module, perturbation: Perturbation, method: TwoPass) -> Iterator[None]:
    """The body of `flatlora.ascent`.

    Raises:
        RuntimeError: there was no backward inside.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p.grad for p in parameters]
    buffers = [b for m in model.modules() if isinstance(m, _BATCH_NORM) for b in m.buffers(recurse=False)]
    statistics = [b.clone() for b in buffers]
    method.forget(perturbation)
    for p in parameters:
        p.grad = None
    try:
        with torch.random.fork_rng(_devices(parameters)), getattr(model, "no_sync", nullcontext)():
            yield
        if all(p.grad is None for p in parameters):
            raise RuntimeError("there was no backward inside `with ascent(model):`")
        with torch.no_grad():
            method.ascend(perturbation)
        perturbation.method_state.done = True
    finally:
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad
        with torch.no_grad():
            for buffer, before in zip(buffers, statistics, strict=True):
                buffer.copy_(before)


def _devices(parameters: list[nn.Parameter]) -> list[torch.device]:
    """The accelerators whose generators the pass may use."""
    return sorted({p.device for p in parameters if p.device.type == "cuda"}, key=str)
