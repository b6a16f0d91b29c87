"""Observe the optimizer steps of a DeepSpeed engine, whose optimizer updates other tensors than the parameters.

`engine.step()`, at the boundary of gradient accumulation:

1. before it, the averaged gradients can be read, and they are held until its end;
2. it looks for an overflow, and if there is none, clips the gradients and steps a torch optimizer over its own flat
   tensors, once for each group of them. Before the first of these, the method acts on gradients and values;
3. after it, the values have been updated, and the step has been counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import is_zero
from .layer_registry import LayerRegistry
from .optimizer_steps import StepListener, listeners
from .whole_parameters import WholeParameters


class EngineListener(StepListener, Protocol):
    """What the steps of an engine are reported to."""

    whole: WholeParameters
    registry: LayerRegistry

    def on_engine_step_end(self, optimizer: Optimizer) -> None:
        """The step was made: it was not skipped because of an overflow."""


def observe_engine(listener: EngineListener, engine: Any) -> None:
    """Report the steps of a DeepSpeed engine to `listener`, until `optimizer_steps.ignore` or until it is deleted.

    Raises:
        RuntimeError: the engine's settings make the gradients unreadable.
    """
    _check(engine, listener.registry.first_factor())
    reference, inner = weakref.ref(listener), weakref.ref(engine)
    before = engine.__dict__.get("step")

    def step(*args: Any, **kwargs: Any) -> Any:
        engine: Any = inner()
        listener = reference()
        make_step = type(engine).step.__get__(engine) if before is None else before
        if listener is None or listener not in listeners() or not engine.is_gradient_accumulation_boundary():
            return make_step(*args, **kwargs)
        with listener.whole.hold(_gradients(listener.registry.factors()), _groups(engine)):
            out = make_step(*args, **kwargs)
            if engine.was_step_applied():
                listener.on_engine_step_end(engine.basic_optimizer)
        return out

    engine.step = step


@contextmanager
def idle(engine: Any) -> Iterator[None]:
    """Inside, a DeepSpeed engine runs forward and backward of its model, and nothing of its own.

    It reduces no gradients, and neither counts nor makes a step, also if accelerate calls it.
    """
    own = engine.__dict__
    names = ("backward", "step", "_backward_prologue")
    before = {name: own[name] for name in names if name in own}

    def backward(loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's
        return loss

    # without its prologue, a backward is not followed by a reduction of gradients
    own.update(backward=backward, step=lambda *args, **kwargs: None, _backward_prologue=lambda: None)
    try:
        yield
    finally:
        for name in names:
            own.pop(name, None)
        own.update(before)


def _check(engine: Any, factor: nn.Parameter | None) -> None:
    managed = getattr(engine, "managed_gradient_accumulation", bool)
    problem = None
    if factor is not None and not is_zero(factor) and not isinstance(engine.optimizer, Optimizer):
        problem = f"{type(engine.optimizer).__name__} does not give access to float32 values: use ZeRO 1, 2, or 3"
    elif engine.pipeline_parallelism:
        problem = "a pipeline does not call engine.step()"
    elif engine.zenflow:
        problem = "ZenFlow updates parameters at other times than in engine.step(): switch it off"
    elif not (managed is bool or managed()):
        problem = "the gradients are not ready before engine.step() with managed_gradient_accumulation=False"
    if problem is not None:
        raise RuntimeError(f"the method needs the gradients at each step of DeepSpeed, and {problem}")


def _gradients(factors: Iterator[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    found = {parameter: safe_get_full_grad(parameter) for parameter in factors}
    return {parameter: grad for parameter, grad in found.items() if grad is not None}


def _groups(engine: Any) -> list[dict[str, Any]]:
    """The groups of the engine's torch optimizer, with the model's parameters in them."""
    groups, zero = engine.basic_optimizer.param_groups, engine.optimizer
    members: list[list[nn.Parameter]] = [[] for _ in groups]
    if hasattr(zero, "sub_group_to_group_id"):  # ZeRO-3
        for sub_group, parameters in enumerate(zero.fp16_groups):
            members[zero.sub_group_to_group_id[sub_group]] += parameters
    elif hasattr(zero, "bit16_groups"):  # ZeRO 1 and 2
        members = [list(parameters) for parameters in zero.bit16_groups]
    else:
        members = [group["params"] for group in groups]
    return [{**group, "params": own} for group, own in zip(groups, members, strict=True)]
