"""Detect training that silently runs without noise."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..methods.base import Method
from ..utils.copying import PartlyCopied, no_object
from .forward_passes import ForwardPasses
from .layer_registry import FlatLayer, LayerRegistry


class Diagnostics(PartlyCopied):
    """What is noted between two optimizer steps, and the checks made of it.

    A check that fails raises an error, or warns once in the life of the model.
    """

    not_copied: ClassVar[frozenset[str]] = frozenset(
        {"layers_run", "layers_perturbed", "layers_in_eval", "layers_bypassed", "idle", "_snapshot", "passes_before"}
        | {"_last_backward", "_in_new_backward"}
    )

    def __init__(self, registry: LayerRegistry, passes: ForwardPasses) -> None:
        self._registry, self._passes = registry, passes
        self.compiled = False  # a flat layer has been compiled: whether it runs is not seen
        self.warned_of: set[str] = set()
        self._start()

    def _start(self) -> None:
        self.idle: set[int] = set()  # numbers of layers that once did not run, rightly
        # an adapter parameter and its value, see `check_steps_observed`
        self._snapshot: tuple[Callable[[], nn.Parameter | None], Tensor | None] = (no_object, None)
        self.begin_interval()

    def begin_interval(self) -> None:
        """An optimizer step has been counted."""
        # numbers of layers
        self.layers_run: set[int] = set()  # in a pass with gradients
        self.layers_perturbed: set[int] = set()  # of those, with noise
        self.layers_in_eval: set[int] = set()  # of those, without noise because they are in evaluation mode
        self.layers_bypassed: set[int] = set()  # that did not run, but whose factors the outputs depend on
        self.passes_before = self._passes.count, self._passes.training
        self._last_backward, self._in_new_backward = torch._C._current_graph_task_id(), False

    def has_trained(self) -> bool:
        """Whether a training pass or a backward has begun since the last step that counted.

        No pass is ever seen of compiled code, or where a loop calls parts of the model that are not watched.
        """
        unseen = self.compiled or not self._passes.training
        return self._passes.training > self.passes_before[1] or (unseen and self._in_new_backward)

    def note_run(self, number: int) -> None:
        """A layer takes part in the coming optimizer step."""
        self.layers_run.add(number)
        # a step may be made inside of a backward
        self._in_new_backward |= torch._C._current_graph_task_id() not in (-1, self._last_backward)

    def note_bypassed(self, layers: set[int], outputs: list[Tensor]) -> None:
        """At the end of a training pass, note layers that did not run although its outputs depend on their factors.

        The graph of the outputs is searched once for each layer that does not run. Experts that are not chosen and
        dropped layers are in order, and a model has many of them.

        Args:
            layers: numbers of the layers that ran.
            outputs: the outputs of the pass that require a gradient.
        """
        missing = [
            layer for layer in self._registry.alive() if layer.number not in layers and layer.number not in self.idle
        ]
        if not missing or self.compiled:
            return
        leaves = leaves_of(outputs)
        for layer in missing:
            bypassed = any(id(p) in leaves for p in _factors(layer))
            (self.layers_bypassed if bypassed else self.idle).add(layer.number)

    def check_layers_run(self) -> None:
        """Check that each layer whose factors are part of the model's output has run its forward.

        Kernels that read the LoRA weights directly (Unsloth's) bypass a layer. A gradient shows nothing: a penalty on
        the weights gives one too, and so do an earlier pass and the average of DDP.

        Raises:
            RuntimeError: a layer was bypassed. With `on_unsupported="warn"` it is a warning, once.
        """
        numbers = self.layers_bypassed - self.layers_run
        if not numbers or self.compiled:
            return
        bypassed = [layer for layer in self._registry.alive() if layer.number in numbers and _has_gradient(layer)]
        if not bypassed:
            return
        names = {id(layer): name for name, layer in self._registry.named()}
        others = f" (and {len(bypassed) - 1} more)" if len(bypassed) > 1 else ""
        message = (
            f"the layer {names.get(id(bypassed[0]), '?')!r} ({type(bypassed[0]).__name__}){others} has gradients, but "
            "its forward has not run since the last optimizer step: something reads the LoRA weights directly (fused "
            "kernels, such as Unsloth's, that replace the forward of attention and MLP), and the adapter trains "
            "without noise."
        )
        if any(layer.strict for layer in bypassed):
            raise RuntimeError(
                f"{message} Load the model without these kernels, or set on_unsupported='warn' to train it without "
                "noise."
            )
        self.warn_once(f"{message} (on_unsupported='warn')")

    def check_train_mode(self) -> None:
        """Warn, once, of layers that train in evaluation mode or without a backward, where nothing is perturbed."""
        if self.compiled:
            return
        passes, training = self.passes_before
        if self.layers_in_eval:
            self._check_evaluation_mode()
        elif (
            not self.layers_perturbed
            and self._passes.count > passes
            and self._passes.training == training
            and any(_has_gradient(layer) for layer in self._registry.alive())
        ):
            self.warn_once(
                "this optimizer step trains without noise: its gradients come from passes under no_grad, as in "
                "zeroth-order methods, and those are not perturbed. Run the passes of each step inside "
                "`with flatlora.perturbed(model, sample=step):`."
            )

    def _check_evaluation_mode(self) -> None:
        if not self.layers_perturbed:
            return self.warn_once(
                "this optimizer step trains without noise: all passes since the last one were in evaluation mode, in "
                "which `from_pretrained` leaves a model. Call model.train() before training."
            )
        # a layer that also ran with noise was evaluated between training passes
        only = self.layers_in_eval - self.layers_perturbed
        layers = [(name, layer) for name, layer in self._registry.named() if layer.number in only]
        layers = [(name, layer) for name, layer in layers if _has_gradient(layer)]
        if layers:
            others = f" (and {len(layers) - 1} more)" if len(layers) > 1 else ""
            self.warn_once(
                f"the layer {layers[0][0]!r}{others} trains without noise: it is in evaluation mode, while other "
                "layers of the model are not. Put it in training mode, freeze its adapter, or leave it out of "
                "target_modules."
            )

    def check_single_optimizer(self, method: Method, optimizer: Optimizer) -> None:
        """Check that a method that uses gradients gets those of all factors at one step.

        Raises:
            RuntimeError: an optimizer that does not lead holds some factors.
        """
        if not method.uses_gradients or method.passes > 1:
            return
        ours = {id(p) for p in self._registry.factors()}
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(method).__name__} takes the gradients of all factors at one optimizer step, and here the "
                f"factors are divided among several optimizers. Give all of them to one {type(optimizer).__name__}, in "
                "parameter groups if their options differ, or use FlatLoraConfig, which needs no gradients."
            )

    def check_steps_observed(self, is_stepping: Callable[[], bool]) -> None:
        """Warn, once, of an adapter that changes although no optimizer step is seen.

        Called where steps are needed and none has been seen yet.
        """
        factor = self._registry.first_factor() if self.layers_run else None
        if factor is None:
            return
        before, value = self._snapshot
        if before() is not factor or value is None or value.dtype != factor.dtype or value.device != factor.device:
            self._snapshot = weakref.ref(factor), factor.detach().clone()
        elif not torch.equal(value, factor) and not is_stepping():
            self.warn_once(
                "the adapter is trained by something that is not a torch.optim.Optimizer, so no optimizer step is "
                "seen: rho_t and noise that is resampled by steps do not change, and a method that uses gradients has "
                "no effect. Call flatlora.perturbation(model).set_step(steps made) after each step (enough for "
                "FlatLoraConfig), or derive from torch.optim.Optimizer."
            )

    def warn_once(self, message: str) -> None:
        if message not in self.warned_of:
            self.warned_of.add(message)
            warnings.warn(message, stacklevel=2)


def leaves_of(outputs: list[Tensor]) -> set[int]:
    """Ids of the parameters that the tensors were computed from, by their autograd graph."""
    todo: list[Any] = [output.grad_fn for output in outputs]
    seen, found = set(todo), set()
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return found


def _factors(layer: FlatLayer) -> list[nn.Parameter]:
    # the regularizer of AdaLoRA gives A and B a gradient whether their layer has run or not
    kind = "lora_E" if hasattr(layer, "lora_E") else "lora_"
    return [p for name, p in layer.named_parameters() if kind in name]


def _has_gradient(layer: FlatLayer) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in _factors(layer))


def refuse_unused_closure(method: Method, optimizer: Optimizer) -> NoReturn:
    """A step of an optimizer that was given a closure has ended, and the closure was not called."""
    raise RuntimeError(
        f"{type(optimizer).__name__} was given a closure and did not call it, so {type(method).__name__} has not seen "
        "the gradients: call backward before optimizer.step() and pass no closure"
    )


def refuse_unknown_optimizer(method: Method, optimizer: Any) -> NoReturn:
    """A DeepSpeed engine has made a step with an optimizer that is not torch's."""
    raise RuntimeError(
        f"{type(optimizer).__name__} is not a torch.optim.Optimizer, so {type(method).__name__} has not seen the "
        "gradients: use an optimizer of torch or DeepSpeed, or FlatLoraConfig"
    )
