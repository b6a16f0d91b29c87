"""Track forward passes with hooks: where one begins and ends, and whether it trains.

Which pass is running is a fact of a thread: one may train while another answers with the same model. Whether a pass
trains is decided where the outermost model is entered, since reentrant gradient checkpointing runs its first forward
under `no_grad`; a `no_grad` block inside of a training pass is told from it by `recompute.find_checkpoints`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from .recompute import Checkpoints, find_checkpoints, in_backward


class _Running(threading.local):
    """The pass that is running in this thread."""

    def __init__(self) -> None:
        self.entered: list[int] = []  # ids of the modules that are running, outermost first
        self.gradients = False  # the pass trains
        self.unused = False  # a pass has begun, and nobody has called `first_use`
        self.token: object | None = None  # names the pass
        self.layers: set[int] = set()  # numbers of the layers whose forward has run
        self.recorded: tuple[int, Any] = (-1, None)  # backward, and the record of the pass that it belongs to


class Passes:
    """Watches the places where a pass of one model may begin.

    Args:
        owner: whose passes these are; `of_model` finds it. It is told where a pass begins, `pass_begins(module)`, and
            where a training pass ends, `pass_ended(layers, outputs)`; what its `record_of_pass()` returns then is
            `recorded` in the backward of that pass.
    """

    def __init__(self, owner: Any) -> None:
        self.belong_to(owner)
        self.count = 0  # of the passes that have begun
        self.training = 0  # of those that train
        self.now_training = False  # for compiled code, whose guards read plain attributes: a training pass is running
        self._running = _Running()
        self._watched: list[weakref.ref] = []  # modules

    def belong_to(self, owner: Any) -> None:
        """Say whose passes these are. Held weakly: the hooks of a model lead here, and must not keep it alive."""
        self._owner: Callable[[], Any] = weakref.ref(owner)

    def watch(self, module: nn.Module) -> None:
        """Take `module` for a place where a pass may begin."""
        if _watcher(module) is not self:
            module.register_forward_pre_hook(self._enter, prepend=True)
            module.register_forward_hook(self._exit, always_call=True)
            self._watched.append(weakref.ref(module))

    def watched(self) -> list[nn.Module]:
        """The modules where a pass may begin."""
        return [module for module in (ref() for ref in self._watched) if module is not None]

    def close(self, model: nn.Module | None = None) -> None:
        """Take the hooks away; in `model` also those that a copy of a part of it has brought along."""
        for module in [*self.watched(), *(() if model is None else model.modules())]:
            _remove_hooks(module, self)
        self._watched = []

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "training": self.training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, now_training=False)
        self.__dict__.update(_running=_Running(), _watched=[])
        self._owner = _nobody  # until the owner comes, if it is in the same copy

    def __deepcopy__(self, memo: dict) -> Passes:
        owner = self._owner()
        if owner is None or owner.is_copied_with_its_model(memo):
            new = memo[id(self)] = object.__new__(type(self))
            new.__setstate__(self.__getstate__())
            return new
        return self  # of a part of a model alone: its passes are those of the model

    def trains(self, checkpoints: Checkpoints | None) -> bool:
        """Does the forward that asks train?

        A `no_grad` block inside of a training pass does not; the first forward of a reentrant checkpoint does. Outside
        of the models that are watched gradients decide.
        """
        running = self._running
        if torch.is_grad_enabled():
            return running.gradients if running.entered else True
        return checkpoints is not None and checkpoints.will_recompute_with_gradients()

    def token(self) -> object | None:
        """Names the pass that is running in this thread; None outside of the models that are watched."""
        return self._running.token

    def first_use(self) -> bool:
        """True once in a pass, and always outside of the models that are watched."""
        first = self._running.unused or not self._running.entered
        self._running.unused = False
        return first

    def recorded(self) -> Any:
        """In a backward: the record of the pass that it belongs to, as far as hooks on its outputs tell. Else None."""
        backward, record = self._running.recorded
        return record if backward != -1 and backward == torch._C._current_graph_task_id() else None

    def note_layer(self, number: int) -> None:
        """The forward of a layer runs."""
        self._running.layers.add(number)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # compiled code asks torch itself
            return
        running = self._running
        if id(module) in running.entered:  # left over from a pass that an interrupt broke off
            del running.entered[running.entered.index(id(module)) :]
        if not running.entered:
            running.gradients = torch.is_grad_enabled() or find_checkpoints().will_recompute_with_gradients()
            running.recorded = running.recorded if in_backward() else (-1, None)
            running.token, running.layers = object(), set()
            if not in_backward():
                running.unused, self.count = True, self.count + 1
                self.training += running.gradients
                self.now_training = running.gradients
                owner = self._owner()
                if owner is not None:
                    owner.pass_begins(module)
        running.entered.append(id(module))

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        running = self._running
        if id(module) in running.entered:
            del running.entered[running.entered.index(id(module)) :]
        if running.entered:
            return
        running.token, self.now_training = None, False
        owner = self._owner()
        if not running.gradients or in_backward() or owner is None:
            return
        record = owner.record_of_pass()

        @unserializable_hook  # an output may be saved, and its hooks need not be
        def recall(_grad: Tensor) -> None:
            running.recorded = torch._C._current_graph_task_id(), record

        found = [tensor for tensor in tensors(output) if tensor.requires_grad and tensor.grad_fn is not None]
        owner.pass_ended(running.layers, found)
        for tensor in found:
            tensor.register_hook(recall)


def of_model(module: nn.Module) -> Any:
    """The owner of the passes that begin at this very module, or None."""
    watcher = _watcher(module)
    return None if watcher is None else watcher._owner()


def root_of(model: nn.Module) -> nn.Module:
    """The model inside peft's wrappers, whose names the layers have."""
    inner = getattr(model, "base_model", None)
    if isinstance(inner, BaseTuner):
        return inner.model
    return model.model if isinstance(model, BaseTuner) else model


def entrances(model: nn.Module) -> list[nn.Module]:
    """The modules that user code enters: the model, each transformers model inside it (the backbone, which fused losses
    and TRL call directly), and the parts of these, for those who call `model.forward` (sentence-transformers) and so no
    hook of the model itself."""
    from transformers import PreTrainedModel

    whole = [model, *(module for module in model.modules() if isinstance(module, PreTrainedModel))]
    return list(dict.fromkeys([*whole, *(part for module in whole for part in _parts(module))]))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """What the forward of a module calls, as far as it has parts of its own; a list of modules is not called."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(child)
        elif any(True for _ in child.children()):
            yield child


def leaves_of(outputs: list[Tensor]) -> set[int]:
    """Ids of the parameters that tensors were computed from, by their autograd graph."""
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


def _nobody() -> None:
    return None


def _remove_hooks(module: nn.Module, passes: Passes) -> None:
    kinds: Any = (
        (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
        (module._forward_hooks, [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]),
    )
    for hooks, flags in kinds:
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is passes]:
            for found in (hooks, *flags):
                found.pop(key, None)


def _watcher(module: nn.Module) -> Passes | None:
    for hook in module._forward_pre_hooks.values():
        watcher = getattr(hook, "__self__", None)
        if isinstance(watcher, Passes):
            return watcher
    return None


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a forward has returned."""
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
