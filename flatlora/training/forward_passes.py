"""Track forward passes with hooks: where a pass begins and ends, and whether it trains.

The running pass belongs to a thread: one thread may train while another one answers with the same model. Whether a pass
trains is decided where the outermost module is entered, because reentrant checkpointing runs its first forward under
`no_grad`. `recompute.find_checkpoints` distinguishes that from a `no_grad` block inside a training pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from ..utils.copying import no_object
from .recompute import Checkpoints, find_checkpoints, in_backward


class PassListener(Protocol):
    """What the passes of a model are reported to."""

    def on_pass_begin(self, module: nn.Module) -> None:
        """The outermost module of a pass is entered."""

    def on_pass_end(self, layers: set[int], outputs: list[Tensor]) -> None:
        """A training pass ends: the numbers of the layers that ran, and the outputs that require a gradient."""

    def record_of_pass(self) -> Any:
        """What `ForwardPasses.recorded` returns in the backward of the pass that ends."""

    def is_copied_with_its_model(self, memo: dict[int, Any]) -> bool:
        """In a `copy.deepcopy`: whether the whole model is copied."""


class _Running(threading.local):
    """The pass that is running in this thread."""

    def __init__(self) -> None:
        self.entered: list[int] = []  # ids of the modules that are running, outermost first
        self.gradients = False  # the pass trains
        self.unused = False  # a pass has begun, and `first_use` has not been called
        self.token: object | None = None  # identifies the pass
        self.layers: set[int] = set()  # numbers of the layers whose forward has run
        self.perturbed: set[int] = set()  # of those, with noise
        self.recorded: tuple[int, Any] = (-1, None)  # backward, and the record of the pass that it belongs to


class ForwardPasses:
    """The forward passes of one model.

    Args:
        listener: what they are reported to; `listener_of` finds it. It is held weakly: the hooks of a model refer to
            this object, and must not keep the model alive.
    """

    def __init__(self, listener: PassListener) -> None:
        self.report_to(listener)
        self.count = 0  # of the passes that have begun
        self.training = 0  # of those that train
        self.now_training = False  # a training pass is running; a plain attribute for the guards of compiled code
        self._running = _Running()
        self._watched: list[weakref.ref[nn.Module]] = []

    def report_to(self, listener: PassListener) -> None:
        """Set the listener."""
        self._listener: Callable[[], PassListener | None] = weakref.ref(listener)

    def watch(self, module: nn.Module) -> None:
        """Add a module at which a pass may begin."""
        if _passes_of(module) is not self:
            module.register_forward_pre_hook(self._enter, prepend=True)
            module.register_forward_hook(self._exit, always_call=True)
            self._watched.append(weakref.ref(module))

    def watched(self) -> list[nn.Module]:
        """The modules at which a pass may begin."""
        return [module for module in (ref() for ref in self._watched) if module is not None]

    def close(self, model: nn.Module | None = None) -> None:
        """Remove the hooks, also those in `model` that came with a copy of a part of the watched model."""
        for module in [*self.watched(), *(() if model is None else model.modules())]:
            _remove_hooks(module, self)
        self._watched = []

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "training": self.training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, now_training=False)
        self.__dict__.update(_running=_Running(), _watched=[])
        self._listener = no_object  # until the copied listener calls `report_to`

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardPasses:
        listener = self._listener()
        if listener is None or listener.is_copied_with_its_model(memo):
            new: ForwardPasses = object.__new__(type(self))
            memo[id(self)] = new
            new.__setstate__(self.__getstate__())
            return new
        return self  # only a part of the model is copied: its passes are those of the model

    def trains(self, checkpoints: Checkpoints | None) -> bool:
        """Whether the forward that calls this trains.

        A `no_grad` block inside a training pass does not; the first forward of a reentrant checkpoint does. Outside
        the watched models it trains if gradients are enabled.
        """
        running = self._running
        if torch.is_grad_enabled():
            return running.gradients if running.entered else True
        return checkpoints is not None and checkpoints.will_recompute_with_gradients()

    def token(self) -> object | None:
        """An object that identifies the pass in this thread; None outside the watched models."""
        return self._running.token

    def first_use(self) -> bool:
        """True once in a pass, and always outside the watched models."""
        first = self._running.unused or not self._running.entered
        self._running.unused = False
        return first

    def recorded(self) -> Any:
        """In a backward: the record of the pass that it belongs to, if the hooks on its outputs have run. Else None."""
        backward, record = self._running.recorded
        return record if backward != -1 and backward == torch._C._current_graph_task_id() else None

    def note_layer(self, number: int) -> None:
        """Note that the forward of a layer runs."""
        self._running.layers.add(number)

    def note_perturbed(self, number: int) -> None:
        """Note that the forward of a layer runs with noise."""
        self._running.perturbed.add(number)

    def layers_perturbed(self) -> set[int]:
        """Numbers of the layers that have run with noise in the pass in this thread."""
        return self._running.perturbed

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # compiled code asks torch itself
            return
        running = self._running
        if id(module) in running.entered:  # left over from a pass that an interrupt broke off
            del running.entered[running.entered.index(id(module)) :]
        if not running.entered:
            self._begin(running, module)
        running.entered.append(id(module))

    def _begin(self, running: _Running, module: nn.Module) -> None:
        running.gradients = torch.is_grad_enabled() or find_checkpoints().will_recompute_with_gradients()
        running.recorded = running.recorded if in_backward() else (-1, None)
        running.token, running.layers, running.perturbed = object(), set(), set()
        if in_backward():
            return
        running.unused, self.count = True, self.count + 1
        self.training += running.gradients
        self.now_training = running.gradients
        listener = self._listener()
        if listener is not None:
            listener.on_pass_begin(module)

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        running = self._running
        if id(module) in running.entered:
            del running.entered[running.entered.index(id(module)) :]
        if not running.entered:
            self._end(running, output)

    def _end(self, running: _Running, output: Any) -> None:
        running.token, self.now_training = None, False
        listener = self._listener()
        if not running.gradients or in_backward() or listener is None:
            return
        record = listener.record_of_pass()

        # an output may be saved without its hooks
        @unserializable_hook  # type: ignore[untyped-decorator]  # torch's
        def recall(_grad: Tensor) -> None:
            running.recorded = torch._C._current_graph_task_id(), record

        found = [tensor for tensor in tensors(output) if tensor.requires_grad and tensor.grad_fn is not None]
        listener.on_pass_end(running.layers, found)
        for tensor in found:
            tensor.register_hook(recall)  # type: ignore[no-untyped-call]  # torch's


def listener_of(module: nn.Module) -> PassListener | None:
    """The listener of the passes that begin at this module, or None."""
    passes = _passes_of(module)
    return None if passes is None else passes._listener()


def root_of(model: nn.Module) -> nn.Module:
    """The model inside peft's wrappers, in which the layers have their names."""
    inner = getattr(model, "base_model", None)
    if isinstance(inner, BaseTuner):
        model_inside: nn.Module = inner.model
        return model_inside
    return model.model if isinstance(model, BaseTuner) else model


def entrances(model: nn.Module) -> list[nn.Module]:
    """The modules that user code calls.

    They are the model, each transformers model inside it (fused losses and TRL call the backbone), and the children of
    these, for code that calls `model.forward` (sentence-transformers) and so does not run the hooks of the model.
    """
    from transformers import PreTrainedModel

    whole = [model, *(module for module in model.modules() if isinstance(module, PreTrainedModel))]
    return list(dict.fromkeys([*whole, *(part for module in whole for part in _called_children(module))]))


def _called_children(module: nn.Module) -> Iterator[nn.Module]:
    """The children that have children themselves. A list of modules is not called, but its items are."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called_children(child)
        elif any(True for _ in child.children()):
            yield child


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in the return value of a forward."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors(getattr(value, name))


def _remove_hooks(module: nn.Module, passes: ForwardPasses) -> None:
    kinds: Any = (
        (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
        (module._forward_hooks, [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]),
    )
    for hooks, flags in kinds:
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is passes]:
            for found in (hooks, *flags):
                found.pop(key, None)


def _passes_of(module: nn.Module) -> ForwardPasses | None:
    for hook in module._forward_pre_hooks.values():
        passes = getattr(hook, "__self__", None)
        if isinstance(passes, ForwardPasses):
            return passes
    return None
