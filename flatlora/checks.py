"""What is looked at when an optimizer steps or a pass begins: does the adapter train with its perturbation at all?"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.optim import Optimizer


def check_reached(state: Any) -> None:
    """Has every layer whose factors have a gradient run its forward? Kernels that read the weights directly pass it by.

    Layers that did not run and have no gradient are no mistake: experts that were not chosen, dropped layers. Nor are
    gradients that were put there while no pass with gradients has begun: loaded, or made by hand. With several
    processes layers that did not run have a gradient too, DDP's average; so there it is a mistake only if no layer ran
    at all. Nothing is looked at in a step where all layers have run.

    Raises:
        RuntimeError: a layer was passed by. With `on_unsupported="warn"` it is a warning, once.
    """
    if state.reached == state.flat_layer_count or state.compiled or not state.enabled:
        return
    if state.passes.recorded == state.passes_before[1]:
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
    """Warn, once, of a model that is trained in evaluation mode or without a backward, where nothing is perturbed."""
    if state.trained or not state.enabled or state.compiled:
        return
    passes, recorded = state.passes_before
    if state.evaluated:
        _warn_once(
            state,
            "this optimizer step trains without noise: all passes since the last one were in evaluation mode, which is "
            "what `from_pretrained` leaves a model in. Call model.train() before training.",
        )
    elif (
        state.passes.count > passes
        and state.passes.recorded == recorded
        and any(_has_gradient(layer) for _, layer in state.flat_layers())
    ):
        _warn_once(
            state,
            "this optimizer step trains without noise: its gradients come from passes under no_grad, as zeroth-order "
            "methods make them, and those are clean. Make the passes inside `with flatlora.perturbed(model):`.",
        )


def check_alone(state: Any, optimizer: Optimizer) -> None:
    """
    Raises:
        RuntimeError: a method that uses the gradients of a step is to see those of several optimizers, of which some
            may have been used and dropped by the time that the others step.
    """
    method = state.settings.method
    if not method.uses_gradients or method.passes > 1 or state.rho == 0:
        return
    ours = {id(p) for p in state.factors()}
    if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(
            f"{type(method).__name__} takes the gradients of all factors at one optimizer step, and here they are "
            f"shared out over several optimizers. Give one {type(optimizer).__name__} all of them, in parameter groups "
            "if their options differ, or use FlatLoraConfig, which needs no gradients."
        )


def check_seen(state: Any) -> None:
    """Warn, once, of an adapter that changes while no optimizer step is seen, where steps are needed."""
    if state.sees_steps or state.steps or not state.reached or not state.needs_steps():
        return
    anchor: Any = state.anchor()
    if anchor is None:
        return
    before, value = state.witness
    if before is not anchor or value.dtype != anchor.dtype or value.device != anchor.device:
        state.witness = anchor, anchor.detach().clone()
    elif not torch.equal(value, anchor) and not state.is_stepping():
        _warn_once(
            state,
            "the adapter is trained by something that is no torch.optim.Optimizer, so no step is seen: rho_t and a "
            "noise that is resampled by steps stay as they are, and a method that uses gradients does nothing. Call "
            "flatlora.perturbation(model).set_step(steps made) after each step (enough for FlatLoraConfig), or derive "
            "from torch.optim.Optimizer.",
        )


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
