"""The optimizer's steps, seen by torch's public hooks: where one begins, where its gradients are there, where it ends.

optimizer.step()             gradients are there when the step begins
optimizer.step(closure)      forward and backward run inside of the step (Lightning, LBFGS): they are there when the
                             closure has run. If it runs several times, each time has the noise of the first: the
                             objective of one step is one function
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
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


def check_reached(state: Any) -> None:
    """Has every layer whose factors have a gradient run its forward? Kernels that read the weights directly pass it by.

    Layers that did not run and have no gradient are no mistake: experts that were not chosen, dropped layers. Nor are
    gradients that were put there while no pass of the model has begun: loaded, or made by hand. With several processes
    layers that did not run have a gradient too, DDP's average; so there it is a mistake only if no layer ran at all.
    Nothing is looked at in a step where all layers have run.

    Raises:
        RuntimeError: a layer was passed by. With `on_unsupported="warn"` it is a warning, once.
    """
    if state.reached == state.flat_layer_count or state.compiled or not state.enabled:
        return
    if state.passes.count == state.passes_before:
        return
    layers = list(state.flat_layers())
    state.flat_layer_count = len(layers)
    if state.reached and _several_processes():
        return
    passed_by = [(name, layer) for name, layer in layers if layer.interval != state.interval and _has_gradient(layer)]
    if not passed_by:
        return
    name, layer = passed_by[0]
    others = f" (and {len(passed_by) - 1} more)" if len(passed_by) > 1 else ""
    message = (
        f"the layer {name!r} ({type(layer).__name__}){others} has gradients, but its forward has not run since the "
        "last optimizer step: something reads the LoRA weights directly (fused kernels, such as Unsloth's, that "
        "replace the forward of attention and MLP), and the adapter trains without noise."
    )
    if any(layer.strict for _, layer in passed_by):
        raise RuntimeError(
            f"{message} Load the model without these kernels, or set on_unsupported='warn' to train it without noise."
        )
    _warn_once(state, f"{message} (on_unsupported='warn')")


def check_mode(state: Any) -> None:
    """Warn, once, of a model that is trained in evaluation mode, where nothing is perturbed."""
    if state.evaluated and not state.trained and state.enabled and not state.compiled:
        _warn_once(
            state,
            "this optimizer step trains without noise: all passes since the last one were in evaluation mode, which is "
            "what `from_pretrained` leaves a model in. Call model.train() before training.",
        )


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


def _warn_once(state: Any, message: str) -> None:
    if message not in state.warned_of:
        state.warned_of.add(message)
        warnings.warn(message, stacklevel=2)


def _has_gradient(layer: Any) -> bool:
    # the regulariser of AdaLoRA gives A and B a gradient whether their layer has run or not
    kind = "lora_E" if hasattr(layer, "lora_E") else "lora_"
    return any(p.grad is not None and bool(p.grad.any()) for name, p in layer.named_parameters() if kind in name)


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
