"""The optimizer's steps, seen by torch's public hooks: where one begins, where its gradients are there, where it ends.

optimizer.step()             gradients are there when the step begins
optimizer.step(closure)      forward and backward run inside of the step (Lightning, LBFGS): they are there when the
                             closure has run. If it runs several times, each time has the noise of the first: the
                             objective of one step is one function
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_watched: weakref.WeakSet = weakref.WeakSet()
_handles: list = []  # one pair of hooks for all: torch goes through them while the collector may end a perturbation


def watch(state: Any) -> None:
    """Tell a perturbation of every optimizer step in this process, until `unwatch` or its end."""
    if not _handles:
        _handles.extend([register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)])
    _watched.add(state)


def unwatch(state: Any) -> None:
    """Tell it no more; the hooks go with the last one."""
    _watched.discard(state)
    while _handles and not _watched:
        _handles.pop().remove()


def overflowed(optimizer: Optimizer) -> bool:
    """Has GradScaler called a fused optimizer for a step that it is to skip by itself?"""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _before(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    for state in list(_watched):
        state.step_began(optimizer)
        if len(args) > 1 and callable(args[1]):
            args = (args[0], _told(args[1], state, optimizer), *args[2:])
        elif callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": _told(kwargs["closure"], state, optimizer)}
        else:
            state.gradients_are_there(optimizer)
    return args, kwargs


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for state in list(_watched):
        state.step_ended(optimizer)


def _told(closure: Callable, state: Any, optimizer: Optimizer) -> Callable:
    """The closure of this step; the perturbation is told each time it has run."""
    first: list = []  # where the noise was when it first ran

    def run(*args: Any, **kwargs: Any) -> Any:
        if first:
            state.repeat_noise(first[0], optimizer)
        else:
            first.append(state.noise_position())
        out = closure(*args, **kwargs)
        state.gradients_are_there(optimizer)
        return out

    return run
