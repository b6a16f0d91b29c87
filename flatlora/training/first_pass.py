"""The first pass of a method with two passes: compute the perturbation, and leave nothing else behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..methods.two_pass import TwoPass
from ..utils.random_states import preserved_rng
from .distributed import is_deepspeed, is_divided, is_zero
from .engine_steps import idle
from .perturbation import Perturbation

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


@contextmanager
def first_pass(model: nn.Module, perturbation: Perturbation, method: TwoPass) -> Iterator[None]:
    """The body of `flatlora.ascent`.

    Raises:
        RuntimeError: there was no backward inside.
    """
    modules = _modules(model, perturbation)
    parameters = [*dict.fromkeys(p for m in modules for p in m.parameters(recurse=False) if p.requires_grad)]
    buffers = [b for m in modules if isinstance(m, _BATCH_NORM) for b in m.buffers(recurse=False)]
    statistics = [b.clone() for b in buffers]
    method.forget(perturbation)
    factor = perturbation.registry.first_factor()
    run = _divided_pass if factor is not None and is_divided(factor) else _whole_pass
    try:
        with run(model, parameters, perturbation, method), preserved_rng(_devices(parameters)):
            yield
        perturbation.method_state.done = True
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, statistics, strict=True):
                buffer.copy_(before)


@contextmanager
def _whole_pass(
    model: nn.Module, parameters: list[nn.Parameter], perturbation: Perturbation, method: TwoPass
) -> Iterator[None]:
    """The gradients are those in `.grad`, which has its former value afterwards."""
    kept = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        with getattr(model, "no_sync", nullcontext)():
            yield
        _check_backward(any(p.grad is not None for p in parameters))
        with torch.no_grad():
            method.ascend(perturbation)
    finally:
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad


@contextmanager
def _divided_pass(
    model: nn.Module, parameters: list[nn.Parameter], perturbation: Perturbation, method: TwoPass
) -> Iterator[None]:
    """The gradients are those of E_A = E_B = 0, which are those of A and B.

    No parameter takes part in the backward. So the engine reduces nothing, and gradients that it accumulates stay.
    """
    whole = perturbation.whole
    zeros: dict[nn.Parameter, Tensor] = {}
    for _, layer in perturbation.flat_layers():
        for adapter in layer.active_flat_adapters():
            for factor in ("lora_A", "lora_B"):
                p = getattr(layer, factor)[adapter].weight
                if isinstance(p, nn.Parameter) and p.requires_grad:
                    dtype = torch.promote_types(p.dtype, torch.float32)
                    zeros[p] = torch.zeros(whole.shape(p), dtype=dtype, device=whole.device(p), requires_grad=True)
                    layer.offsets[factor, adapter] = zeros[p]
    for p in parameters:
        p.requires_grad_(False)
    try:
        with _engine_idle(model, perturbation, any(map(is_zero, zeros))):
            yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
        method.forget(perturbation)
    if zeros:
        whole.average_gradients(next(iter(zeros)), list(zeros.values()))
    gradients = {p: zero.grad for p, zero in zeros.items() if zero.grad is not None}
    _check_backward(bool(gradients))
    with torch.no_grad(), whole.hold(gradients):
        method.ascend(perturbation)


def _engine_idle(model: nn.Module, perturbation: Perturbation, expected: bool) -> AbstractContextManager[None]:
    engine = model if is_deepspeed(model) else perturbation.schedule.counter.engine
    if engine is None and expected:
        raise RuntimeError("the model trains with DeepSpeed: pass its engine, `with ascent(engine):`")
    if engine is None:
        return nullcontext()
    perturbation.follow_engine(engine)
    return idle(engine)


def _modules(model: nn.Module, perturbation: Perturbation) -> list[nn.Module]:
    """What trains: the module that `ascent` was given, which may be a part or a wrapper, and the perturbed model."""
    known = model if perturbation.model is None else perturbation.model
    return [*dict.fromkeys([*model.modules(), *known.modules()])]


def _check_backward(made: bool) -> None:
    if not made:
        raise RuntimeError("there was no backward inside `with ascent(model):`")


def _devices(parameters: list[nn.Parameter]) -> list[torch.device]:
    """The accelerators whose generators the pass may use."""
    return sorted({p.device for p in parameters if p.device.type == "cuda"}, key=str)
