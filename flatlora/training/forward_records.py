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


class Moment(NamedTuple):
    """What a recompute must find as its first forward did, although a step or the user may have changed it."""

    seed: int
    strengths: dict[str, float]  # rho_t of each adapter


class Record(NamedTuple):
    """The noise of one forward of a layer."""

    sample: int
    perturbed: bool
    token: object | None = None  # identifies its pass
    rho: float | None = None  # strength that `perturbed` set
    moment: Moment | None = None  # of the first forward, for a recompute


class PassRecord(NamedTuple):
    """The noise of a whole pass, for recomputes that no checkpoint is known of."""

    sample: int
    forced: bool  # by `perturbed(...)`
    enabled: bool
    rho: float | None  # set by `perturbed`
    moment: Moment
    layers: set[int]  # numbers of those that were perturbed


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
        sample, layers = self._sample(override), self._passes.layers_perturbed()
        return PassRecord(sample, override.forced, override.enabled, override.rho, self._moment(), layers)

    def of_forward(self, layer: int, training: bool, has_noise: bool = True, thread: int | None = None) -> Record:
        """The record of a layer's forward that begins now.

        Args:
            layer: number of the layer.
            training: whether the layer is in training mode.
            has_noise: whether its rho is above 0.
            thread: the thread of the user's code, if it is another one (`nn.DataParallel`).

        Raises:
            RuntimeError: it is a recompute, and its first forward is not known.
        """
        checkpoints = find_checkpoints() if may_be_checkpointed() else None
        record: Record | None = None if checkpoints is None else checkpoints.read(layer)
        if record is None and has_noise:
            record = self._new(layer, training, checkpoints, self._overrides.now(thread))
        elif record is None:
            record = Record(self._noise.sample, False)
        if checkpoints is not None and checkpoints.running:
            checkpoints.write(layer, record._replace(moment=record.moment or self._moment()))
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

    def strength(self, adapters: list[str]) -> float:
        """The largest strength of these adapters in the running forward; outside of any, in one that would begin."""
        record = self._thread.record
        chosen = self._overrides.now().rho if record is None else record.rho
        if chosen is not None:
            return chosen
        if record is not None and record.moment is not None:
            return max([0.0, *[record.moment.strengths[name] for name in adapters]])
        return max([0.0, *[self._schedule.rhos[name] for name in adapters]]) * self._schedule.ramp

    def seed(self) -> int:
        """The seed of the running forward, with the rank mixed in."""
        record = self._thread.record
        return self._noise.mixed_seed() if record is None or record.moment is None else record.moment.seed

    def note_backward(self) -> None:
        """The backward of a perturbed layer runs: it uses the sample, unless `perturbed` has set another one."""
        recorded: PassRecord | None = self._passes.recorded()
        if recorded is None or not recorded.forced:
            self._noise.on_backward()

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
        if overrides.differ_now:  # compiled code does not know its thread
            return None
        if overrides.forced_now or not overrides.enabled_now:
            return overrides.forced_now and overrides.enabled_now
        if not training or torch.is_grad_enabled():
            return training
        return None if self._passes.now_training else False

    def _new(self, layer: int, training: bool, checkpoints: Checkpoints | None, override: Override) -> Record:
        enabled, forced, token = override.enabled, override.forced, self._passes.token()
        recorded: PassRecord | None = self._passes.recorded() if in_backward() else None
        if recorded is not None:
            trains = training and self._passes.trains(checkpoints)
            perturbed = recorded.enabled and (recorded.forced or trains)
            if perturbed and not recorded.forced and layer not in recorded.layers:
                raise RuntimeError(_UNKNOWN_FORWARD)
            return Record(recorded.sample, perturbed, token, recorded.rho, recorded.moment)
        perturbed = enabled and (forced or (training and self._passes.trains(checkpoints)))
        if perturbed and not forced:
            if in_backward():
                raise RuntimeError(_UNKNOWN_FORWARD)
            self._take_new_sample()
        if perturbed:
            self._passes.note_perturbed(layer)
        return Record(self._sample(override), perturbed, token, override.rho)

    def _moment(self) -> Moment:
        ramp = self._schedule.ramp
        return Moment(self._noise.mixed_seed(), {name: rho * ramp for name, rho in self._schedule.rhos.items()})

    def _sample(self, override: Override) -> int:
        return self._noise.sample if override.sample is None else override.sample

    def _take_new_sample(self) -> None:
        with self._lock:  # replicas run in threads and share the sample
            if self._passes.first_use():
                self._noise.take_new_sample()
        self._schedule.warn_of_unknown_length()


_UNKNOWN_FORWARD = (
    "a layer is recomputed in a backward, but not by a checkpoint of torch, or by an autograd Function whose forward "
    "has ctx as its first argument, so the noise of its first forward is not known. Use torch.utils.checkpoint, with "
    "use_reentrant=False or True. With a loss that "
    "caches gradients (the Cached losses of sentence-transformers), run the whole training step inside "
    "`with flatlora.perturbed(model, sample=step):`."
)
