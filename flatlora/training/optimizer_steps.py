"""Observe optimizer steps in any loop, with torch's public hooks.

optimizer.step()             the gradients are ready when the step begins
optimizer.step(closure)      forward and backward run inside the step (Lightning, LBFGS): the gradients are ready when
                             the closure has run. If it runs several times, each run has the noise of the first one,
                             because the objective of one step is one function
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..utils.copying import PartlyCopied, no_object


class NoisePosition(NamedTuple):
    """Where the noise of a model is."""

    sample: int
    sample_used: bool


class RunPosition(NamedTuple):
    """Where the training of a model is."""

    steps: int
    noise: NoisePosition
    origin: tuple[float, int]  # see `Schedule.origin`


class StepListener(Protocol):
    """What the optimizer steps of this process are reported to."""

    def on_step_begin(self, optimizer: Optimizer) -> None: ...

    def on_gradients_ready(self, optimizer: Optimizer) -> None:
        """The gradients are those that the optimizer is about to use."""

    def on_step_end(self, optimizer: Optimizer) -> None: ...

    def noise_position(self) -> NoisePosition: ...

    def repeat_noise(self, position: NoisePosition, optimizer: Optimizer) -> None:
        """The closure of a step runs again: with the noise from this position."""


_listeners: weakref.WeakSet[StepListener] = weakref.WeakSet()
# one pair of hooks for all listeners: torch iterates over its hooks while a listener may be garbage collected
_handles: list[Any] = []
_lock = threading.RLock()  # one thread may create a model while another one steps


def observe(listener: StepListener) -> None:
    """Report every optimizer step of this process to `listener`, until `ignore` or until it is deleted."""
    with _lock:
        if not _handles:
            _handles.extend([register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)])
        _listeners.add(listener)


def ignore(listener: StepListener) -> None:
    """Report nothing more to `listener`. The hooks are removed with the last one."""
    with _lock:
        _listeners.discard(listener)
        while _handles and not _listeners:
            _handles.pop().remove()


def listeners() -> list[StepListener]:
    """All listeners of this process."""
    with _lock:
        return list(_listeners)


def overflowed(optimizer: Optimizer) -> bool:
    """Whether GradScaler has called a fused optimizer for a step that the optimizer is to skip."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def creates_state(optimizer: Optimizer) -> bool:
    """Whether this looks like the step by which torch.distributed.checkpoint creates the state: no learning rate."""
    groups = optimizer.param_groups
    has_gradients = any(p.grad is not None for group in groups for p in group["params"])
    return has_gradients and all(group.get("lr", 1) == 0 for group in groups)


class LeadingOptimizer(PartlyCopied):
    """The optimizer whose steps count, among those that hold adapter parameters.

    It is the one that holds the first trainable factor. Without such a one it is the first that holds any factor, until
    another one steps twice while it does not.
    """

    not_copied: ClassVar[frozenset[str]] = frozenset({"_began", "_leader", "_stepped", "_last_counted"})

    def __init__(self) -> None:
        self.prepared = False  # the method has seen the gradients of the step that is being made
        self.seen = False  # a step of the leading optimizer has been seen
        self._start()

    def _start(self) -> None:
        # optimizer -> number of steps when its own began
        self._began: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._leader: Callable[[], Optimizer | None] = no_object
        self._holds_first = False  # the leader holds the first factor
        # the others that have stepped since the last step that counted
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._last_counted: Callable[[], Optimizer | None] = no_object

    def leads(self, optimizer: Optimizer, factors: Iterator[nn.Parameter], trained: bool) -> bool:
        """Whether the steps of this optimizer count.

        Args:
            factors: the trainable adapter parameters.
            trained: whether a training pass has begun since the last step that counted.
        """
        leader = self._leader()
        if leader is optimizer:
            return True
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        first = next(factors, None)
        if first is not None and id(first) in held:
            self._leader, self._holds_first = weakref.ref(optimizer), True
        elif not any(id(p) in held for p in factors):
            return False
        elif leader is None or (not self._holds_first and optimizer in self._stepped and trained):
            self._leader, self._holds_first = weakref.ref(optimizer), False
        return self._leader() is optimizer

    def begin(self, optimizer: Optimizer, steps: int) -> None:
        """A step of an optimizer begins."""
        self._began[optimizer] = steps

    def begun(self) -> list[Optimizer]:
        """The optimizers that have begun a step."""
        return list(self._began)

    def is_nested(self, optimizer: Optimizer, steps: int) -> bool:
        """Whether an optimizer that this one wraps has counted the step."""
        return self._began.get(optimizer, steps) != steps

    def note_other(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped that does not lead."""
        self._stepped.add(optimizer)

    def shares_step(self, optimizer: Optimizer, trained: bool) -> bool:
        """Whether the former leader has counted the step that this optimizer takes part in."""
        return self._last_counted() not in (None, optimizer) and not trained

    def count(self, optimizer: Optimizer) -> None:
        """A step counts."""
        self.seen, self.prepared = True, False
        self._last_counted = weakref.ref(optimizer)
        self._stepped.clear()


def _before(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for listener in listeners():
        listener.on_step_begin(optimizer)
        if len(args) > 1 and callable(args[1]):
            args = (args[0], _wrap_closure(args[1], listener, optimizer), *args[2:])
        elif callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": _wrap_closure(kwargs["closure"], listener, optimizer)}
        else:
            listener.on_gradients_ready(optimizer)
    return args, kwargs


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for listener in listeners():
        listener.on_step_end(optimizer)


def _wrap_closure(closure: Callable[..., Any], listener: StepListener, optimizer: Optimizer) -> Callable[..., Any]:
    """The closure of this step, which reports each time it has run."""
    first: list[NoisePosition] = []  # before its first run

    def run(*args: Any, **kwargs: Any) -> Any:
        if first:
            listener.repeat_noise(first[0], optimizer)
        else:
            first.append(listener.noise_position())
        out = closure(*args, **kwargs)
        listener.on_gradients_ready(optimizer)
        return out

    return run
