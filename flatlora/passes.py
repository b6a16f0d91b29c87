"""Which pass of a model is running: seen by hooks where a pass begins and ends.

Were gradients enabled where the outermost model was entered? Asking inside a layer would be wrong: reentrant gradient
checkpointing runs its first pass under `no_grad`. And a forward that is computed again in a backward must have the
noise of its own first time, which hooks on the outputs of that forward bring back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook


class Passes:
    """Watches the places where a pass of one model may begin.

    Args:
        owner: whose passes these are; `of_model` finds it, and its `pass_begins()` is called for each.
        note: called when a pass with gradients ends; what it returns is `recalled` while the backward of that pass
            runs.
    """

    def __init__(self, owner: Any, note: Callable[[], Any]) -> None:
        self.owner = owner
        self.unused = False  # a pass has begun, and nobody has called `first_use`
        self.count = 0  # of the passes that have begun
        self.recorded = 0  # of those with gradients
        self._note = note
        self._entered: list[int] = []  # ids of the modules that are running, outermost first
        self._gradients = False  # were enabled where the outermost one was entered
        self._without: set[int] = set()  # ids of modules that were outermost last without them
        self._backward_note: Any = None
        self._handles: list = []

    def watch(self, module: nn.Module) -> None:
        """Take `module` for a place where a pass may begin."""
        if _watcher(module) is not self:
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._exit, always_call=True))

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getstate__(self) -> dict[str, Any]:
        # the handles of a tuner that is gone, as transformers' add_adapter leaves them, cannot be copied
        alive = [handle for handle in self._handles if handle.hooks_dict_ref() is not None]
        return {**self.__dict__, "_handles": alive}

    def with_gradients(self) -> bool:
        """Were gradients enabled where the outermost model was entered (or here, outside of any model)?"""
        return self._gradients if self._entered else torch.is_grad_enabled()

    def first_use(self) -> bool:
        """True once in a pass, and always outside of the models that are watched."""
        first = self.unused or not self._entered
        self.unused = False
        return first

    def recalled(self) -> Any:
        """In a backward: what was noted of the forward that it belongs to, if known. Elsewhere None."""
        return self._backward_note if in_backward() else None

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # compiled code asks torch itself
            return
        if id(module) in self._entered:  # left over from a pass that an interrupt broke off
            del self._entered[self._entered.index(id(module)) :]
        if not self._entered:
            self._gradients = torch.is_grad_enabled()
            if not in_backward():
                self.unused, self._backward_note, self.count = True, None, self.count + 1
                self.recorded += self._gradients
                self.owner.pass_begins()
                (self._without.discard if self._gradients else self._without.add)(id(module))
            elif (
                self._gradients
                and id(module) in self._without
                and self._backward_note is None
                and not self.owner.forced
            ):
                raise RuntimeError(
                    f"{type(module).__name__} is computed again in a backward, and its first pass was under no_grad: "
                    "that cannot be told from an evaluation, so it was not perturbed. Under torch.utils.checkpoint use "
                    "use_reentrant=False, or checkpoint the layers (model.gradient_checkpointing_enable()). With a "
                    "loss that caches gradients (sentence-transformers' Cached losses) make the whole training step "
                    "inside `with flatlora.perturbed(model, sample=step):`."
                )
        self._entered.append(id(module))

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if id(module) in self._entered:
            del self._entered[self._entered.index(id(module)) :]
        if self._entered or not self._gradients or in_backward():
            return
        note = self._note()

        @unserializable_hook  # an output may be saved, and its hooks need not be
        def recall(_grad: Tensor) -> None:
            self._backward_note = note

        for tensor in tensors(output):
            if tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(recall)


def of_model(module: nn.Module) -> Any:
    """The owner of the passes that begin at this very module, or None."""
    watcher = _watcher(module)
    return None if watcher is None else watcher.owner


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


def in_backward() -> bool:
    """Is this thread running a backward? Compiled code is traced as a forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


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
