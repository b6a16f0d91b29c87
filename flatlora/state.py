"""The state that all layers of a model share: seed and noise sample, and, in `strength.py`, strength and schedule."""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint
from .checks import (
    check_layers_run,
    check_single_optimizer,
    check_steps_observed,
    check_train_mode,
    note_bypassed,
)
from .ops import resolve_backend
from .ops.blocks import unwatched
from .ops.philox import mix_rank
from .parts import join_parts
from .passes import Passes, entrances, of_model, root_of
from .recompute import Checkpoints, find_checkpoints, in_backward, may_be_checkpointed
from .settings import Settings
from .spread import calling_deepspeed, global_rank, is_deepspeed, is_sharded
from .steps import follow_state, overflowed, unwatch, watch
from .strength import Strength
from .utils.arguments import INT64, SEED, Checked, boolean, integer

_numbers = itertools.count(1)


class Record(NamedTuple):
    """What the forward of a layer was, for when it is computed again."""

    sample: int
    perturbed: bool
    token: object | None = None  # of its pass


class PassRecord(NamedTuple):
    """The same of a whole pass, where a recompute is not seen to be that of a checkpoint."""

    sample: int
    forced: bool  # by `perturbed(...)`
    enabled: bool


class Override(NamedTuple):
    """What `perturbed(...)` and `unperturbed(...)` say, in the thread that entered them."""

    enabled: bool = True
    forced: bool = False
    sample: int | None = None


class _Thread(threading.local):
    record: Record | None = None  # of the layer whose forward is running


class Perturbation(Strength):
    """The noise of one model: its strength, its schedule and its current sample.

        eps_ij = rho_t / sqrt(n) * ||W'_i|| * z(seed, rank, sample, layer, i, j),    rho_t = rho * ramp(progress)

    Get it with `flatlora.perturbation(model)`. All of it can be read; `rho`, `progress`, `total_steps`, `sample`,
    `seed`, `rank` and `enabled` can be set.

    Attributes:
        rhos: strength of each flat adapter, by name.
        settings: as given at construction.
        total_steps: length of the ramp in optimizer steps, None if not known.
        steps: optimizer steps made.
        sample: index of the current noise sample.
        seed: 64-bit integer; by default torch's initial seed, so that `set_seed` reproduces a run (it is read, the
            generator is not used).
        rank: data-parallel rank, which gives each process noise of its own. By default the rank in the default group:
            right for DDP, FSDP and ZeRO. Set it where processes share a batch (context or sequence parallelism).
        enabled: False keeps every pass clean.
    """

    sample = Checked(integer, 0, INT64)
    seed = Checked(integer, *SEED)

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._model: Callable[[], Any] = weakref.ref(model)
        super().__init__(settings)
        self.sample = 0
        self.seed = torch.initial_seed() if settings.seed is None else settings.seed
        self._enabled = True
        self.layers = 0  # noise streams handed out
        self.sees_steps = False  # an optimizer step has been seen
        self._rank: int | None = None
        self.ascended = False  # a first pass of two has been made for the coming optimizer step
        self.climber: torch.optim.Optimizer | None = None  # of Bi-LoRA's second module
        self.climber_state: dict[str, Any] | None = None  # loaded, for when it is made
        self.compiled = False  # a flat layer has been compiled: whether it runs is not seen
        self.warned_of: set[str] = set()
        self._prepared = False  # the method has been told of the optimizer step that is being made
        self._stale = False  # a backward has used the sample: the next training forward takes a new one
        self._key: tuple[tuple, Tensor] | None = None  # the last one; a key is never written again
        self._last_counted: Any = _none  # the optimizer that made the last step that counted
        self._make_fresh()
        self.passes = Passes(self)
        self._begin_interval()
        for module in entrances(model):
            self.passes.watch(module)
        self._enrol()

    def _make_fresh(self) -> None:
        """What is not copied: weak references, and what is true of this object alone."""
        self._began: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # optimizer -> steps when its own began
        self._origins: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # optimizer -> position when first seen
        self._leader: tuple[Any, bool] = (_none, False)  # optimizer whose steps count; does it hold the first factor?
        self._stepped: weakref.WeakSet = weakref.WeakSet()  # other optimizers, since the last step that counted
        self._weights: list[tuple[weakref.ref, int]] = []  # a tied weight keeps one noise stream
        self._layers: list[weakref.ref] = []  # the flat layers, in the order in which they came
        self.snapshot: tuple = (_none, None)  # a factor and its value, see `checks.check_seen`
        self._engine_ref: Any = _none  # the DeepSpeed engine that makes the steps
        self._overrides: dict[int, Override] = {}  # by thread
        self.forced_now, self.enabled_now = False, self._enabled  # for compiled code, which reads plain attributes
        self._thread, self._lock = _Thread(), threading.Lock()
        self.known_modules: weakref.WeakSet = weakref.WeakSet()  # that have called a pass
        self.idle: set[int] = set()  # numbers of layers that have once been seen not to run, rightly

    def _begin_interval(self) -> None:
        """What is noted between two optimizer steps that count."""
        self.layers_run: set[int] = set()  # numbers of the layers that have run in a pass with gradients
        self.layers_perturbed: set[int] = set()  # of those, with noise
        self.layers_in_eval: set[int] = set()  # and without, since they are in evaluation mode
        self.layers_bypassed: set[int] = set()  # of others, whose factors the outputs depend on all the same
        self.passes_before = self.passes.count, self.passes.training
        self._interval_start = self._position()

    @property
    def model(self) -> nn.Module | None:
        """The model whose layers these are; None once it is gone."""
        return self._model()

    def bind(self, model: nn.Module) -> None:
        """Say whose layers these are, where a copy does not know it."""
        if self.model is None:
            self._model = weakref.ref(root_of(model))

    @classmethod
    def shared(cls, model: nn.Module, settings: Settings) -> Perturbation:
        """The perturbation of this model, made if there is none.

        Raises:
            ValueError: there is one with other settings.
        """
        state = of_model(model)
        if state is None:
            return cls(model, settings)
        check_same_settings(state, settings)
        return state

    @property
    def rank(self) -> int:
        return global_rank() if self._rank is None else self._rank

    @rank.setter
    def rank(self, value: int | None) -> None:
        self._rank = integer("rank", value, 0, 2**32 - 1, optional=True)

    # ---- which passes ----

    @property
    def enabled(self) -> bool:
        return self._enabled and self._override().enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = self.enabled_now = boolean("enabled", value)

    @contextmanager
    def override(self, **changes: Any) -> Iterator[None]:
        """`perturbed` and `unperturbed`, in this thread alone."""
        thread, before = threading.get_ident(), self._overrides.get(threading.get_ident())
        self._set_override(thread, (before or Override())._replace(**changes))
        try:
            yield
        finally:
            self._set_override(thread, before)

    def _set_override(self, thread: int, value: Override | None) -> None:
        if value is None:
            self._overrides.pop(thread, None)
        else:
            self._overrides[thread] = value
        now = value or Override()
        self.forced_now, self.enabled_now = now.forced, now.enabled and self._enabled

    def _override(self, thread: int | None = None) -> Override:
        found = self._overrides.get(threading.get_ident() if thread is None else thread)
        if found is None and self._overrides and in_backward():  # autograd has threads of its own for accelerators
            found = next(reversed(self._overrides.values()), None)
        return found or Override()

    def record_of_pass(self) -> PassRecord:
        """What is remembered of a training pass that ends."""
        override = self._override()
        return PassRecord(
            self.sample if override.sample is None else override.sample,
            override.forced,
            self._enabled and override.enabled,
        )

    def record_of_forward(self, layer: int, training: bool, thread: int | None = None) -> Record:
        """Is the forward of a layer (in training mode or not) perturbed, and by which sample?

        A forward that is computed again is what it was the first time.

        Args:
            layer: number of the layer.
            training: the layer is in training mode.
            thread: that in which the user's code runs, if it is another one (`nn.DataParallel`).

        Raises:
            RuntimeError: it is computed again, and what it was the first time is not known.
        """
        checkpoints = find_checkpoints() if may_be_checkpointed() else None
        record = None if checkpoints is None else checkpoints.read(layer)
        if record is None:
            record = self._new_record(training, checkpoints, self._override(thread))
        if checkpoints is not None:
            checkpoints.write(layer, record)
        return record

    def _new_record(self, training: bool, checkpoints: Checkpoints | None, override: Override) -> Record:
        enabled, forced, token = self._enabled and override.enabled, override.forced, self.passes.token()
        recorded = self.passes.recorded() if in_backward() else None
        if recorded is not None:
            trains = training and self.passes.trains(checkpoints)
            return Record(recorded.sample, recorded.enabled and (recorded.forced or trains), token)
        perturbed = enabled and (forced or (training and self.passes.trains(checkpoints)))
        if perturbed and not forced:
            if in_backward():
                raise RuntimeError(_UNKNOWN_FORWARD)
            self._take_new_sample()
        return Record(self.sample if override.sample is None else override.sample, perturbed, token)

    @contextmanager
    def forward_of(self, record: Record) -> Iterator[None]:
        """The forward of a layer: what it draws is the noise of its record."""
        thread = self._thread
        before, thread.record = thread.record, record
        try:
            yield
        finally:
            thread.record = before

    def compiled_forward_is_perturbed(self, training: bool) -> bool | None:
        """`record_of_forward` where a forward is traced by `torch.compile`; None if that cannot be known there."""
        if self.forced_now or not self.enabled_now:
            return self.forced_now and self.enabled_now
        if not training or torch.is_grad_enabled():
            return training
        return None if self.passes.now_training else False

    # ---- which noise ----

    def drawn(self) -> tuple[int, int]:
        """Seed, with the rank mixed in, and sample of the noise for the forward that asks, a training forward or one
        inside `perturbed`.

        A new sample is taken at the first training forward after a backward; a recompute takes the sample of its own
        forward.
        """
        return mix_rank(self.seed, self.rank), self._current_record().sample

    def _current_record(self) -> Record:
        """Of the layer whose forward is running in this thread; outside of any, that of a forward that came now."""
        record = self._thread.record
        if record is not None:
            return record
        override = self._override()
        if not override.forced and not in_backward():
            self._take_new_sample()
        return Record(self.sample if override.sample is None else override.sample, True, self.passes.token())

    def draw(self, device: torch.device) -> tuple[Tensor, int]:
        """The same as the int64 tensor (seed, sample), the key, and the sample."""
        seed, sample = self.drawn()
        source, known = (seed, sample & 0xFFFFFFFF, device, torch.is_inference_mode_enabled()), self._key
        if known is None or known[0] != source:
            with unwatched():
                key = self.empty_key(device)
                key[0], key[1] = source[:2]  # two fills: no copy from the host
            known = self._key = source, key
        return known[1], sample

    def empty_key(self, device: torch.device) -> Tensor:
        """Room for a key: where the kernel reads it, on the CPU for the backends that read it there."""
        return torch.empty(2, dtype=torch.int64, device=device if self.backend(device) == "triton" else "cpu")

    def token(self) -> object | None:
        """Names the pass of the forward that asks, in which A and B do not change; None where that is not known."""
        record = self._thread.record
        return self.passes.token() if record is None else record.token

    def backward_began(self) -> None:
        """Called by every perturbed layer's gradient: the sample has been used."""
        if self.settings.resample == "forward":
            self._stale = True

    def backend(self, device: torch.device) -> str:
        """Name of the noise backend on this device."""
        return resolve_backend(self.settings.backend, device)

    def _take_new_sample(self) -> None:
        with self._lock:  # replicas run in threads, and share the sample
            if self.passes.first_use() and self._stale:
                self.sample, self._stale = self.sample + 1, False
        self._warn_of_length()

    # ---- the optimizer's steps ----

    def pass_begins(self, module: nn.Module) -> None:
        """Called where the outermost module of a pass is entered.

        Raises:
            RuntimeError: DeepSpeed makes the optimizer's steps, and the method needs to see them.
        """
        self.bind(module)
        join_parts(self)
        engine, steps = calling_deepspeed(), self.steps
        if engine is None:
            return check_steps_observed(self)
        if self.settings.method.uses_gradients and self.rho > 0:
            self.refuse_shards(engine)
        if engine is not self._engine:
            self._engine_ref = weakref.ref(engine)
            self.steps = steps  # as many as before: from here on the engine counts
        self._after_step()

    def pass_ended(self, layers: set[int], outputs: list[Tensor]) -> None:
        """Called where a training pass ends, with the numbers of the layers that have run and what it returns."""
        note_bypassed(self, layers, outputs)

    @property
    def counts_steps(self) -> bool:
        """Are the optimizer's steps seen here? Not where it holds other parameters than the model (FSDP1)."""
        return self.sees_steps or self._engine is not None

    def step_began(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of this process begins a step."""
        self._began[optimizer] = self.steps

    def on_gradients_ready(self, optimizer: torch.optim.Optimizer) -> None:
        """What the optimizer is about to use is there: from before the step, or from the closure it has just called."""
        if not self._leads(optimizer):
            check_single_optimizer(self, optimizer)
        elif not self._prepared and not overflowed(optimizer):
            self._prepared = True
            if self.rho > 0:
                check_layers_run(self)
                check_train_mode(self)
            if self.settings.method.uses_gradients and self.rho > 0:
                self.refuse_shards()
                self._warn_of_length()
            self.settings.method.before_step(self, optimizer)

    def _leads(self, optimizer: torch.optim.Optimizer) -> bool:
        """Is this the optimizer whose steps count?

        It is the one that holds the first trainable factor; without one, the first that holds any, until another one
        steps twice while it does not.
        """
        reference, holds_first = self._leader
        leader = reference()
        if leader is optimizer:
            return True
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        factors = self.factors()
        first = next(factors, None)
        if first is not None and id(first) in held:
            self._follow(optimizer, True)
        elif not any(id(p) in held for p in factors):
            return False
        elif leader is None or (not holds_first and optimizer in self._stepped and self._has_trained()):
            self._follow(optimizer, False)
        return self._leader[0]() is optimizer

    def _follow(self, optimizer: torch.optim.Optimizer, holds_first: bool) -> None:
        """From now on the steps of this optimizer count."""
        self._leader = weakref.ref(optimizer), holds_first
        if optimizer not in self._origins:
            self._origins[optimizer] = self._interval_start
            follow_state(self, optimizer)

    def _has_trained(self) -> bool:
        """Has a training pass begun since the last step that counted?"""
        return self.passes.training > self.passes_before[1]

    def refuse_shards(self, model: nn.Module | None = None) -> None:
        """
        Raises:
            RuntimeError: the method needs whole gradients, and the adapter is sharded (FSDP, ZeRO), or `model` is a
                DeepSpeed engine.
        """
        anchor = self.anchor()
        if is_deepspeed(model) or (anchor is not None and is_sharded(anchor)):
            raise RuntimeError(
                f"{type(self.settings.method).__name__} needs whole gradients at the optimizer's step on the adapter's "
                "own parameters, and here they are sharded or replaced (FSDP, DeepSpeed). Use DDP or one process, or "
                "FlatLoraConfig, which needs none."
            )

    def step_ended(self, optimizer: torch.optim.Optimizer) -> None:
        """It has been made: count it, if it is a step of the adapter's own optimizer."""
        inside = self._began.get(optimizer, self.steps) != self.steps  # an optimizer that this one wraps has counted it
        if self._engine is not None or inside or overflowed(optimizer):
            return
        if not self._leads(optimizer):
            self._stepped.add(optimizer)
        elif self._is_one_of_several(optimizer):
            self._prepared = False
        else:
            if self.settings.method.uses_gradients and not self._prepared and self.rho > 0:
                raise RuntimeError(
                    f"{type(optimizer).__name__} was given a closure and did not call it, so "
                    f"{type(self.settings.method).__name__} has not seen the gradients: call backward before "
                    "optimizer.step() and pass no closure"
                )
            self._count_step(optimizer)

    def _is_one_of_several(self, optimizer: torch.optim.Optimizer) -> bool:
        """Has another optimizer, which led until now, counted the step that this one takes part in?"""
        taken_over = self._last_counted() not in (None, optimizer)
        return taken_over and not self._has_trained()

    def _count_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps, self.sees_steps, self._prepared = self.steps + 1, True, False
        self._last_counted = weakref.ref(optimizer)
        self._stepped.clear()
        self._after_step()
        self._begin_interval()
        self.settings.method.after_step(self, optimizer)

    def is_stepping(self) -> bool:
        """Has an optimizer of the adapter begun a step?"""
        return any(self._leads(optimizer) for optimizer in list(self._began))

    def _position(self) -> tuple:
        return self.steps, self.sample, self._stale, self._origin

    def noise_position(self) -> tuple[int, bool]:
        """Where the noise is, for `repeat_noise`."""
        return self.sample, self._stale

    def repeat_noise(self, position: tuple[int, bool], optimizer: torch.optim.Optimizer) -> None:
        """The closure of a step runs once more: from the same noise again.

        Raises:
            RuntimeError: the method makes its perturbation from the gradients of a step, and there are several.
        """
        method = self.settings.method
        if method.uses_gradients and self.rho > 0 and self._leads(optimizer):
            raise RuntimeError(
                f"{type(optimizer).__name__} calls its closure several times in a step, and {type(method).__name__} is "
                "defined for one gradient a step. Use an optimizer that calls it once, or FlatLoraConfig."
            )
        self.sample, self._stale = position

    def take_back(self, optimizer: torch.optim.Optimizer, steps: int | None) -> None:
        """An optimizer has loaded a state of before (a learning-rate finder, a rollback): count its steps no more.

        Args:
            steps: how many; None for all that it has made.
        """
        start, sample, stale, origin = self._origins[optimizer]
        if steps is None or steps >= self.steps - start:
            self.steps, self.sample, self._stale, self._origin = start, sample, stale, origin
        else:
            self.steps -= steps
        self._after_step()
        self._begin_interval()

    def _after_step(self) -> None:
        if self.settings.resample == "step":
            self.sample = self.steps

    def flat_layers(self) -> Iterator[tuple[str, Any]]:
        """(name in the model, layer) of the layers that this perturbs."""
        for name, module in () if self.model is None else self.model.named_modules():
            if module.__dict__.get("perturbation") is self:
                yield name, module

    def layers_alive(self) -> list[Any]:
        """The layers that this perturbs, in the order in which they were adapted, without a walk through the model."""
        found = [layer for layer in (ref() for ref in self._layers) if layer is not None]
        return [layer for layer in found if layer.__dict__.get("perturbation") is self]

    def factors(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of the adapters in the layers that this perturbs."""
        for layer in self.layers_alive():
            for name, parameter in layer.named_parameters():
                if "lora_" in name and parameter.requires_grad:
                    yield parameter

    def anchor(self) -> nn.Parameter | None:
        """One trainable adapter parameter."""
        return next(self.factors(), None)

    # ---- saving and resuming ----

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue with the same perturbation: plain numbers, and under "tensors" what
        the method keeps (nothing for Flat-LoRA).

        `accelerator.register_for_checkpointing(perturbation(model))` saves and loads it with the rest.
        """
        return {
            "seed": self.seed,
            "sample": self.sample,
            "stale": self._stale,
            "steps": self.steps,
            "total_steps": self.total_steps,
            "origin": list(self._origin),
            "rhos": dict(self.rhos),
            "tensors": self.tensors(),
            "climber": self.climber_state if self.climber is None else self.climber.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Nothing is changed unless all of `state` is right.

        Raises:
            ValueError: an entry is missing, senseless, or of an adapter or a layer that this model does not have.
        """
        known = checkpoint.check(self, state)
        self.seed, self.sample, self._stale = known["seed"], known["sample"], known["stale"]
        self.steps, self.total_steps, self._origin = known["steps"], known["total_steps"], known["origin"]
        self.rhos.update(known["rhos"])
        self.load_tensors(known["tensors"])
        self.climber, self.climber_state = None, known["climber"]

    def tensors(self) -> dict[str, Tensor]:
        """What the method keeps on the layers, by ``layer.factor.adapter``; not copies."""
        return {
            f"{name}.{factor}.{adapter}": tensor.detach()
            for name, layer in self.flat_layers()
            for (factor, adapter), tensor in layer.offsets.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, layer in self.flat_layers():
            for key, tensor in tensors.items():
                factor, _, adapter = key.removeprefix(f"{name}.").partition(".")
                if key.startswith(f"{name}.{factor}.") and adapter in layer.flat_adapters:
                    found = layer.offsets.get((factor, adapter))
                    copy = tensor.detach().clone() if found is None else found.detach().copy_(tensor)
                    layer.offsets[factor, adapter] = copy if found is None else found

    # ---- life ----

    def stream_of(self, weight: Tensor) -> int:
        """Index of the noise stream of a layer with this weight: a new one, unless the weight is tied to one seen."""
        for seen, index in self._weights:
            if seen() is weight:
                return index
        self._weights.append((weakref.ref(weight), self.layers))
        self.layers += 1
        return self.layers - 1

    def enrol(self, layer: Any) -> None:
        """Take a layer among those that this perturbs: one that has just become flat, or a copy.

        The copy of a layer whose model was copied with it keeps the stream it has; that of a part of a model, put
        somewhere beside the original, gets one of its own.
        """
        anchor = layer.anchor()
        taken = any(other.stream == layer.stream and other.anchor() is not anchor for other in self.layers_alive())
        if taken:
            layer.__dict__["stream"] = self.stream_of(anchor)
        elif not any(seen() is anchor for seen, _ in self._weights):
            self._weights.append((weakref.ref(anchor), layer.stream))
        self._layers.append(weakref.ref(layer))

    def drop(self, layers: list[Any]) -> None:
        """Layers that are no longer in the model."""
        self._layers = [ref for ref in self._layers if not any(ref() is layer for layer in layers)]

    def _enrol(self) -> None:
        self.number = next(_numbers)  # names this object while layers are compiled
        watch(self)

    def close(self, model: nn.Module | None = None) -> None:
        """Take every hook away; also those in `model` that a copy of a part of it has brought along."""
        self.passes.close(model)
        self._layers = []
        unwatch(self)

    def is_copied_with_its_model(self, memo: dict) -> bool:
        """In a `copy.deepcopy`: is the whole model copied, and not a part of it?"""
        model = self.model
        if model is None or id(model) in memo:
            return True
        return not any(id(module) in memo for module in model.modules())  # then it is on its way to the model

    def __deepcopy__(self, memo: dict) -> Perturbation:
        if not self.is_copied_with_its_model(memo):
            return self
        new = memo[id(self)] = object.__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied = memo.get(id(self.model))
        if copied is not None:
            new._model = weakref.ref(copied)
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in _NOT_COPIED}
        return {**state, "_counted": self.steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = self._last_counted = _none
        self._make_fresh()
        self.passes.belong_to(self)
        self._enrol()


def check_same_settings(state: Perturbation, settings: Settings) -> None:
    """
    Raises:
        ValueError: the settings are not those of the flat adapters that the model has. They may differ in rho only.
    """
    for name, value in vars(settings).items():
        known = getattr(state.settings, name)
        if value != known:
            raise ValueError(
                f"{name} is {known!r} for the flat adapters that this model has, got {value!r}: the noise of a "
                "model has one schedule and one seed. Give this config the same value (rho may differ)."
            )


def _none() -> None:
    """A weak reference to nothing."""
    return None


_NOT_COPIED = {
    *("_model", "_began", "_origins", "_leader", "_stepped", "_last_counted", "_weights", "_layers", "snapshot"),
    *("_engine_ref", "_overrides", "forced_now", "enabled_now", "_thread", "_lock", "known_modules", "idle", "number"),
}
_UNKNOWN_FORWARD = (
    "a layer is computed again in a backward, by no checkpoint of torch and no autograd Function, so that it is not "
    "known how it was perturbed in its first forward. torch.utils.checkpoint works, with use_reentrant=False or True. "
    "With a loss that caches gradients (sentence-transformers' Cached losses) make the whole training step inside "
    "`with flatlora.perturbed(model, sample=step):`."
)
