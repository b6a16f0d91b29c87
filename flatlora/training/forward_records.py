"""Which forwards of a layer are perturbed, and by which sample. A recompute repeats its first forward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch

from ..utils.copying import PartlyCopied
from .forward_passes import ForwardPasses
from .noise_stream import NoiseStream
from .overrides import Override, Overrides
from .recompute import Checkpoints, find_checkpoints, in_backward, may_be_checkpointed
from .schedule import Schedule


class Record(NamedTuple):
    """The noise of one forward of a layer."""

    sample: int
    perturbed: bool
    token: object | None = None  # identifies its pass
    rho: float | None = None  # strength that `perturbed` set


class PassRecord(NamedTuple):
    """The noise of a whole pass, for recomputes that no checkpoint is known of."""

    sample: int
    forced: bool  # by `perturbed(...)`
    enabled: bool
    rho: float | None  # set by `perturbed`


class _Thread(threading.local):
    record: Record | None = None  # of the layer whose forward is running


class ForwardRecords(PartlyCopied):
    """Decides for each forward of a layer whether it is perturbed, and by which sample."""

    not_copied: ClassVar[frozenset[str]] = frozenset({"_thread", "_lock"})

    def __init__(self, passes: ForwardPasses, overrides: Overrides, noise: NoiseStream, schedule: Schedule) -> None:
        self._passes, self._overrides, self._noise, self._schedule = passes, overrides, noise, schedule
        self._start()

    def _start(self) -> None:
        self._thread, self._lock = _Thread(), threading.Lock()

    def of_pass(self) -> PassRecord:
        """The record of a training pass that ends now."""
        override = self._overrides.now()
        return PassRecord(self._sample(override), override.forced, override.enabled, override.rho)

    def of_forward(self, layer: int, training: bool, thread: int | None = None) -> Record:
        """The record of a layer's forward that begins now.

        Args:
            layer: number of the layer.
            training: whether the layer is in training mode.
            thread: the thread of the user's code, if it is another one (`nn.DataParallel`).

        Raises:
            RuntimeError: it is a recompute, and its first forward is not known.
        """
        checkpoints = find_checkpoints() if may_be_checkpointed() else None
        record: Record | None = None if checkpoints is None else checkpoints.read(layer)
        if record is None:
            record = self._new(training, checkpoints, self._overrides.now(thread))
        if checkpoints is not None:
            checkpoints.write(layer, record)
        return record

    def current(self) -> Record:
        """The record of the forward that runs in this thread; outside of any, that of one that would begin now."""
        record = self._thread.record
        if record is not None:
            return record
        override = self._overrides.now()
        if not override.forced and not in_backward():
            self._take_new_sample()
        return Record(self._sample(override), True, self._passes.token(), override.rho)

    def strength(self, rho_t: float) -> float:
        """The strength of the running forward, where the schedule says `rho_t`; outside of any, of one that begins."""
        record = self._thread.record
        chosen = self._overrides.now().rho if record is None else record.rho
        return rho_t if chosen is None else chosen

    @contextmanager
    def running(self, record: Record) -> Iterator[None]:
        """The forward of a layer runs inside: the noise that it draws is that of `record`."""
        thread = self._thread
        before, thread.record = thread.record, record
        try:
            yield
        finally:
            thread.record = before

    def token(self) -> object | None:
        """Identifies the pass of the running forward, in which A and B do not change; None if it is not known."""
        record = self._thread.record
        return self._passes.token() if record is None else record.token

    def compiled_forward_is_perturbed(self, training: bool) -> bool | None:
        """`of_forward` where `torch.compile` traces a forward; None if it cannot be known there."""
        overrides = self._overrides
        if overrides.forced_now or not overrides.enabled_now:
            return overrides.forced_now and overrides.enabled_now
        if not training or torch.is_grad_enabled():
            return training
        return None if self._passes.now_training else False

    def _new(self, training: bool, checkpoints: Checkpoints | None, override: Override) -> Record:
        enabled, forced, token = override.enabled, override.forced, self._passes.token()
        recorded: PassRecord | None = self._passes.recorded() if in_backward() else None
        if recorded is not None:
            trains = training and self._passes.trains(checkpoints)
            return Record(recorded.sample, recorded.enabled and (recorded.forced or trains), token, recorded.rho)
        perturbed = enabled and (forced or (training and self._passes.trains(checkpoints)))
        if perturbed and not forced:
            if in_backward():
                raise RuntimeError(_UNKNOWN_FORWARD)
            self._take_new_sample()
        if checkpoints is not None and checkpoints.running and perturbed and override.rho and self._schedule.rho == 0:
            raise RuntimeError(_NO_RHO)  # the recompute would be without noise
        return Record(self._sample(override), perturbed, token, override.rho)

    def _sample(self, override: Override) -> int:
        return self._noise.sample if override.sample is None else override.sample

    def _take_new_sample(self) -> None:
        with self._lock:  # replicas run in threads and share the sample
            if self._passes.first_use():
                self._noise.take_new_sample()
        self._schedule.warn_of_unknown_length()


_NO_RHO = (
    "perturbed(..., rho=...) cannot be used on a checkpointed forward of a model whose rho is 0: set "
    "flatlora.perturbation(model).rho instead"
)
_UNKNOWN_FORWARD = (
    "a layer is recomputed in a backward, but not by a checkpoint of torch or by an autograd Function, so the noise of "
    "its first forward is not known. Use torch.utils.checkpoint, with use_reentrant=False or True. With a loss that "
    "caches gradients (the Cached losses of sentence-transformers), run the whole training step inside "
    "`with flatlora.perturbed(model, sample=step):`."
)
