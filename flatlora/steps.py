"""The optimizer's steps, seen by torch's public hooks: where one begins, where its gradients are there, where it ends.

optimizer.step()             gradients are there when the step begins
optimizer.step(closure)      forward and backward run inside of the step (Lightning, LBFGS): they are there when the
                             closure has run. If it runs several times, each time has the noise of the first: the
                             objective of one step is one function
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_watched: weakref.WeakSet = weakref.WeakSet()
_handles: list = []  # one pair of hooks for all: torch goes through them while the collector may end a perturbation
_lock = threading.RLock()  # models are made in one thread while another one steps


def watch(state: Any) -> None:
    """Tell a perturbation of every optimizer step in this process, until `unwatch` or its end."""
    with _lock:
        if not _handles:
            _handles.extend([register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)])
        _watched.add(state)


def unwatch(state: Any) -> None:
    """Tell it no more; the hooks go with the last one."""
    with _lock:
        _watched.discard(state)
        while _handles and not _watched:
            _handles.pop().remove()


def watched() -> list[Any]:
    """The perturbations of this process."""
    with _lock:
        return list(_watched)


def overflowed(optimizer: Optimizer) -> bool:
    """Has GradScaler called a fused optimizer for a step that it is to skip by itself?"""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def follow_state(state: Any, optimizer: Optimizer) -> None:
    """Notice when an optimizer loads a state of before: the steps that it has made since are counted no more."""
    ours = weakref.ref(state)

    def before_load(optimizer: Optimizer, loaded: dict[str, Any]) -> None:
        state = ours()
        if state is None:
            return
        made, kept = _steps_in(optimizer.state), _steps_in(loaded["state"])
        if not loaded["state"] and (optimizer.state or _options(optimizer.state_dict()) != _options(loaded)):
            state.take_back(
                optimizer, None
            )  # of before its first step; one that keeps no state is known by its options
        elif made is not None and kept is not None and kept < made:
            state.take_back(optimizer, made - kept)

    optimizer.register_load_state_dict_pre_hook(before_load)


def _steps_in(state: Any) -> int | None:
    """Steps made, as far as an optimizer's state tells."""
    steps = [int(kept["step"]) for kept in state.values() if isinstance(kept, dict) and "step" in kept]
    return max(steps, default=None)


def _options(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]


def _before(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    for state in watched():
        state.step_began(optimizer)
        if len(args) > 1 and callable(args[1]):
            args = (args[0], _wrap_closure(args[1], state, optimizer), *args[2:])
        elif callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": _wrap_closure(kwargs["closure"], state, optimizer)}
        else:
            state.on_gradients_ready(optimizer)
    return args, kwargs


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for state in watched():
        state.step_ended(optimizer)


def _wrap_closure(closure: Callable, state: Any, optimizer: Optimizer) -> Callable:
    """The closure of this step; the perturbation is told each time it has run."""
    first: list = []  # where the noise was when it first ran

    def run(*args: Any, **kwargs: Any) -> Any:
        if first:
            state.repeat_noise(first[0], optimizer)
        else:
            first.append(state.noise_position())
        out = closure(*args, **kwargs)
        state.on_gradients_ready(optimizer)
        return out

    return run
