"""Take optimizer steps back that do not count anymore: a learning rate finder, or a return to an earlier checkpoint.

Both save and load the state of the optimizer and the adapter, in any order. So the position of the run is noted when
the state of an optimizer is saved, with the values of two factors. After an optimizer has loaded a state, the run goes
back to the position at which these factors had the values that they have now, if there is one. It goes on from where it
is if the optimizer alone loads a state (to set its options, to forget its moments in each round), or if
`load_state_dict` or `set_step` has set its position.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..utils.copying import PartlyCopied
from .optimizer_steps import RunPosition

WITNESSES = 2  # factors whose values tell where the adapter is: A and B of a layer
MOST_SAVED = 16


class Run(Protocol):
    """The run of a model: its perturbation."""

    rollbacks: Rollbacks

    def position(self) -> RunPosition: ...

    def set_position(self, position: RunPosition) -> None: ...


class Saved(NamedTuple):
    """A position of the run, and the values of the witnesses there."""

    position: RunPosition
    values: list[Tensor]


class Rollbacks(PartlyCopied):
    """The positions to which a run may return.

    Attributes:
        loaded: an optimizer has loaded a state, and the adapter may still be set back.
        placed: the position of the run has been set since the last step that counted.
    """

    not_copied: ClassVar[frozenset[str]] = frozenset({"_watched", "_witnesses", "_saved", "loaded", "placed"})

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._watched: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._witnesses: list[weakref.ref[nn.Parameter]] = []
        self._saved: deque[Saved] = deque(maxlen=MOST_SAVED)
        self.loaded = self.placed = False

    def watch(self, run: Run, optimizer: Optimizer, origin: RunPosition, factors: Iterator[nn.Parameter]) -> None:
        """Watch what an optimizer saves and loads, from the first gradients of its run on."""
        if optimizer in self._watched:
            return
        if any(ref() is None for ref in self._witnesses) or not self._witnesses:
            trained = (p for p in factors if p.grad is not None and p.numel())
            self._witnesses = [weakref.ref(p) for p in islice(trained, WITNESSES)]
            self._saved.clear()
        if not self._witnesses:
            return
        self._watched.add(optimizer)
        self._save(origin)
        reference = weakref.ref(run)

        def before_save(_: Optimizer) -> None:
            run = reference()
            if run is not None:
                run.rollbacks._save(run.position())

        def before_load(_: Optimizer, _state: dict[str, Any]) -> None:
            run = reference()
            if run is not None:
                run.rollbacks.loaded = True
                run.rollbacks.settle(run)

        optimizer.register_state_dict_pre_hook(before_save)
        optimizer.register_load_state_dict_pre_hook(before_load)

    def settle(self, run: Run, at_last: bool = False) -> None:
        """Set the run back if its adapter was. After the load of the optimizer that may come later, until `at_last`."""
        if not self.loaded:
            return
        self.loaded = False
        if self.placed:
            return
        back = next((saved.position for saved in reversed(self._saved) if self._is_at(saved.values)), None)
        if back is None:
            self.loaded = not at_last
        elif back.steps != run.position().steps:
            run.set_position(back)

    def _save(self, position: RunPosition) -> None:
        found = [ref() for ref in self._witnesses]
        self._saved.append(Saved(position, [p.detach().clone() for p in found if p is not None]))

    def _is_at(self, values: list[Tensor]) -> bool:
        found = [ref() for ref in self._witnesses]
        return len(found) == len(values) and all(_same(p, value) for p, value in zip(found, values, strict=True))


def _same(tensor: Tensor | None, value: Tensor) -> bool:
    if tensor is None or (tensor.shape, tensor.dtype, tensor.device) != (value.shape, value.dtype, value.device):
        return False
    return torch.equal(tensor.detach(), value)
