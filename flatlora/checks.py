"""Detect training that silently runs without noise."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .passes import leaves_of


def note_bypassed(state: Any, layers: set[int], outputs: list[Tensor]) -> None:
    """At the end of a training pass: note layers whose factors are in the graph of its outputs, and that did not run.

    The graph is searched once for each layer that is first seen not to run: experts that were not chosen and dropped
    layers are in order, and a model has many of them.
    """
    idle = [layer for layer in state.layers_alive() if layer.number not in layers and layer.number not in state.idle]
    if not idle or state.compiled or not state.enabled or state.rho == 0:
        return
    leaves = leaves_of(outputs)
    for layer in idle:
        bypassed = any(id(p) in leaves for _, p in _factors(layer))
        (state.layers_bypassed if bypassed else state.idle).add(layer.number)


def check_layers_run(state: Any) -> None:
    """Has every layer run its forward whose factors are part of the model's output?

    Kernels that read the LoRA weights directly (Unsloth's) pass a layer by. That a layer has a gradient shows nothing:
    a penalty on its weights gives it one, and so do an earlier pass and DDP's average.

    Raises:
        RuntimeError: a layer was passed by. With `on_unsupported="warn"` it is a warning, once.
    """
    numbers = state.layers_bypassed - state.layers_run
    if not numbers or state.compiled or not state.enabled:
        return
    idle = [layer for layer in state.layers_alive() if layer.number in numbers and _has_gradient(layer)]
    if not idle:
        return
    names = {id(layer): name for name, layer in state.flat_layers()}
    others = f" (and {len(idle) - 1} more)" if len(idle) > 1 else ""
    message = (
        f"the layer {names.get(id(idle[0]), '?')!r} ({type(idle[0]).__name__}){others} has gradients, but its forward "
        "has not run since the last optimizer step: something reads the LoRA weights directly (fused kernels, such as "
        "Unsloth's, that replace the forward of attention and MLP), and the adapter trains without noise."
    )
    if any(layer.strict for layer in idle):
        raise RuntimeError(
            f"{message} Load the model without these kernels, or set on_unsupported='warn' to train it without noise."
        )
    _warn_once(state, f"{message} (on_unsupported='warn')")


def check_train_mode(state: Any) -> None:
    """Warn, once, of layers that train in evaluation mode or without a backward, where nothing is perturbed."""
    if not state.enabled or state.compiled:
        return
    passes, training = state.passes_before
    if state.layers_in_eval:
        _check_evaluated(state)
    elif (
        not state.layers_perturbed
        and state.passes.count > passes
        and state.passes.training == training
        and any(_has_gradient(layer) for layer in state.layers_alive())
    ):
        _warn_once(
            state,
            "this optimizer step trains without noise: its gradients come from passes under no_grad, as zeroth-order "
            "methods make them, and those are clean. Make the passes inside `with flatlora.perturbed(model):`.",
        )


def _check_evaluated(state: Any) -> None:
    if not state.layers_perturbed:
        return _warn_once(
            state,
            "this optimizer step trains without noise: all passes since the last one were in evaluation mode, which is "
            "what `from_pretrained` leaves a model in. Call model.train() before training.",
        )
    # a layer that also ran perturbed was evaluated beside its training
    only = state.layers_in_eval - state.layers_perturbed
    layers = [(name, layer) for name, layer in state.flat_layers() if layer.number in only and _has_gradient(layer)]
    if layers:
        others = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
        _warn_once(
            state,
            f"the layer {layers[0][0]!r}{others} trains without noise: it is in evaluation mode, while other layers of "
            "the model are not. Put it in training mode, freeze its adapter, or leave it out of target_modules.",
        )


def check_single_optimizer(state: Any, optimizer: Optimizer) -> None:
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


def check_steps_observed(state: Any) -> None:
    """Warn, once, of an adapter that changes while no optimizer step is seen, where steps are needed."""
    if state.sees_steps or state.steps or not state.layers_run or not state.needs_steps():
        return
    anchor: Any = state.anchor()
    if anchor is None:
        return
    before, value = state.snapshot
    if before() is not anchor or value.dtype != anchor.dtype or value.device != anchor.device:
        state.snapshot = weakref.ref(anchor), anchor.detach().clone()
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


def _factors(layer: Any) -> list[tuple[str, Tensor]]:
    # the regularizer of AdaLoRA gives A and B a gradient whether their layer has run or not
    kind = "lora_E" if hasattr(layer, "lora_E") else "lora_"
    return [(name, p) for name, p in layer.named_parameters() if kind in name]


def _has_gradient(layer: Any) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for _, p in _factors(layer))
