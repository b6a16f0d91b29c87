"""Take optimizer steps back that do not count anymore: a learning rate finder, or a return to an earlier checkpoint.

Both load an earlier state into the optimizer and earlier values into the adapter, in any order. A run goes on from
where it is if the optimizer alone loads an earlier state (to set its options, to forget its moments in each round), or
if `load_state_dict` or `set_step` has set its position.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..utils.copying import PartlyCopied, no_object
from .optimizer_steps import RunPosition

WITNESSES = 2  # factors whose values tell whether the adapter has been set back: A and B of a layer


class Run(Protocol):
    """The run of a model: its perturbation."""

    rollbacks: Rollbacks

    def position(self) -> RunPosition: ...

    def set_position(self, position: RunPosition) -> None: ...


class Seen:
    """An optimizer when it was first seen.

    Attributes:
        origin: where the run was.
        versions: of the witnesses after the last step that counted.
    """

    def __init__(self, origin: RunPosition, factors: Iterator[nn.Parameter]) -> None:
        self.origin = origin
        trained = (p for p in factors if p.grad is not None)
        self._witnesses = [(weakref.ref(p), p.detach().clone()) for p in islice(trained, WITNESSES)]
        self.note_versions()

    def note_versions(self) -> None:
        self.versions = self._versions()

    def is_at_origin(self) -> bool:
        """Whether the factors have the values that they had then."""
        return bool(self._witnesses) and all(_same(ref(), value) for ref, value in self._witnesses)

    def is_written(self) -> bool:
        """Whether something has written to the factors since the last step that counted."""
        return self.versions != self._versions()

    def _versions(self) -> list[int | None]:
        return [None if p is None else p._version for p in (ref() for ref, _ in self._witnesses)]


class Rollbacks(PartlyCopied):
    """The optimizers of a run, and what they have loaded.

    Attributes:
        placed: the position of the run has been set since the last step that counted.
    """

    not_copied: ClassVar[frozenset[str]] = frozenset({"_seen", "_loaded", "placed"})

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._seen: weakref.WeakKeyDictionary[Optimizer, Seen] = weakref.WeakKeyDictionary()
        # the optimizer that has loaded an earlier state, and the steps since then; None for all of its steps
        self._loaded: tuple[Callable[[], Optimizer | None], int | None] = (no_object, None)
        self.placed = False

    def watch(self, run: Run, optimizer: Optimizer, origin: RunPosition, factors: Iterator[nn.Parameter]) -> None:
        """Watch what an optimizer loads, once its steps count."""
        if optimizer in self._seen:
            return
        self._seen[optimizer] = Seen(origin, factors)
        reference = weakref.ref(run)

        def before_load(optimizer: Optimizer, loaded: dict[str, Any]) -> None:
            run = reference()
            if run is not None:
                run.rollbacks.note_load(run, optimizer, loaded)

        optimizer.register_load_state_dict_pre_hook(before_load)

    def note_load(self, run: Run, optimizer: Optimizer, loaded: dict[str, Any]) -> None:
        """An optimizer loads a state."""
        made, kept = _steps_in(optimizer.state), _steps_in(loaded["state"])
        if not loaded["state"] and (optimizer.state or _options(optimizer.state_dict()) != _options(loaded)):
            # the state before its first step; an optimizer without a state is recognized by its options
            self._loaded = weakref.ref(optimizer), None
        elif made is not None and kept is not None and kept < made:
            self._loaded = weakref.ref(optimizer), made - kept
        self.settle(run, at_load=True)

    def settle(self, run: Run, at_load: bool = False) -> None:
        """Take steps back if the adapter was set back with its optimizer. At the load it may not have been yet."""
        optimizer, steps = self._loaded[0](), self._loaded[1]
        if optimizer is None:
            return
        seen, position = self._seen[optimizer], run.position()
        is_back = seen.is_at_origin() if steps is None else seen.is_written()
        if is_back or self.placed or not at_load:
            self._loaded = (no_object, None)
        if not is_back or self.placed:
            return
        if steps is None or steps >= position.steps - seen.origin.steps:
            run.set_position(seen.origin)
        else:
            run.set_position(position._replace(steps=position.steps - steps))

    def note_step(self, optimizer: Optimizer) -> None:
        """A step has been counted."""
        self.placed = False
        if optimizer in self._seen:
            self._seen[optimizer].note_versions()


def _same(tensor: Tensor | None, value: Tensor) -> bool:
    same = tensor is not None and tensor.shape == value.shape and tensor.dtype == value.dtype
    return same and tensor is not None and tensor.device == value.device and torch.equal(tensor.detach(), value)


def _steps_in(state: Any) -> int | None:
    """The number of steps in an optimizer's state, None if it is not there."""
    steps = [int(kept["step"]) for kept in state.values() if isinstance(kept, dict) and "step" in kept]
    return max(steps, default=None)


def _options(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
