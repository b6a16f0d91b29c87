"""The perturbation of one model: what users read and set, over parts that each have one job.

| part           | file               | job                                                         |
| -------------- | ------------------ | ----------------------------------------------------------- |
| `schedule`     | schedule.py        | rho, progress, rho_t                                        |
| `noise`        | noise_stream.py    | seed, rank, sample, key                                     |
| `graph`        | graph_tensors.py   | the key and rho_t that captured CUDA graphs read            |
| `passes`       | forward_passes.py  | where a forward pass begins and ends, and whether it trains |
| `overrides`    | overrides.py       | `enabled`, `perturbed`, `unperturbed`                       |
| `records`      | forward_records.py | which forward is perturbed by which sample; recomputes      |
| `registry`     | layer_registry.py  | the flat layers and their noise streams                     |
| `leader`       | optimizer_steps.py | the optimizer whose steps count                             |
| `rollbacks`    | rollback.py        | steps that do not count anymore                             |
| `diagnostics`  | diagnostics.py     | training that silently runs without noise                   |
| `whole`        | whole_parameters.py | factors and gradients that are divided among processes     |
| `method_state` | methods/           | what the method remembers                                   |
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import Settings
from ..utils.arguments import INT64, integer
from ..utils.copying import PartlyCopied
from .checkpoint import check_state
from .data_parallel import mesh_of
from .diagnostics import Diagnostics, refuse_unknown_optimizer, refuse_unused_closure
from .distributed import calling_deepspeed
from .engine_steps import observe_engine
from .forward_passes import ForwardPasses, entrances, listener_of
from .forward_records import ForwardRecords, PassRecord
from .graph_tensors import GraphTensors, is_capturing
from .layer_registry import LayerRegistry
from .model_parts import join_calling_parts
from .noise_stream import NoiseStream
from .optimizer_steps import LeadingOptimizer, NoisePosition, RunPosition, creates_state, ignore, observe, overflowed
from .overrides import Overrides
from .rollback import Rollbacks
from .schedule import Schedule
from .whole_parameters import WholeParameters

_numbers = itertools.count(1)


class Perturbation(PartlyCopied):
    """The perturbation of one model: its strength, its schedule and its current noise sample.

        eps_ij = rho_t / sqrt(n) * ||W'_i|| * z(seed, rank, sample, layer, i, j),    rho_t = rho * ramp(progress)

    `flatlora.perturbation(model)` returns it. `rho`, `progress`, `total_steps`, `sample`, `seed`, `rank` and `enabled`
    can be set.

    Attributes:
        rho: strength. With several flat adapters it is the largest; setting it sets all.
        rhos: strength of each flat adapter, by name.
        rho_t: ``rho * ramp(progress)``, the strength now.
        progress: part of the run that is over, in [0, 1]: optimizer steps over `total_steps`, or as set.
        total_steps: length of the ramp in optimizer steps, None if unknown.
        steps: optimizer steps made.
        sample: index of the current noise sample.
        graph: what captured CUDA graphs read.
        seed: 64-bit integer; default torch's initial seed, so that `set_seed` reproduces a run.
        rank: data-parallel rank: processes with different batches have different noise, and processes that share a
            batch (tensor, context, sequence parallelism) have the same. Default: see `training/data_parallel.py`. Set
            it where processes share a batch and no device mesh says so.
        enabled: False switches the noise off.
        settings: the settings at construction.
    """

    not_copied: ClassVar = frozenset({"graph", "known_modules", "number", "_interval_start", "_has_trained"})

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self.schedule = Schedule(settings.schedule, settings.total_steps)
        self.noise = NoiseStream(settings.seed, settings.resample, settings.backend)
        self.overrides = Overrides()
        self.registry = LayerRegistry(model)
        self.passes = ForwardPasses(self)
        self.records = ForwardRecords(self.passes, self.overrides, self.noise, self.schedule)
        self.leader = LeadingOptimizer()
        self.rollbacks = Rollbacks()
        self.diagnostics = Diagnostics(self.registry, self.passes)
        self.whole = WholeParameters()
        self.method_state: Any = settings.method.make_state()  # a MethodState of the method's own class
        for module in entrances(model):
            self.passes.watch(module)
        self._start()

    def _start(self) -> None:
        self.graph = GraphTensors(self.noise, self.schedule)
        self.number = next(_numbers)  # identifies this object while layers are compiled
        self.known_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # that have called a pass
        self.passes.report_to(self)
        self._interval_start, self._has_trained = self.position(), False  # whether a training pass has ended
        observe(self)

    @classmethod
    def shared(cls, model: nn.Module, settings: Settings) -> Perturbation:
        """The perturbation of this model, created if there is none.

        Raises:
            ValueError: there is one with other settings.
        """
        found = listener_of(model)
        if not isinstance(found, cls):
            return cls(model, settings)
        check_same_settings(found, settings)
        return found

    # ---- strength ----

    @property
    def rho(self) -> float:
        return self.schedule.rho

    @rho.setter
    def rho(self, value: float) -> None:
        self.schedule.rho = value

    @property
    def rhos(self) -> dict[str, float]:
        return self.schedule.rhos

    @property
    def ramp(self) -> float:
        """The schedule at the current progress, in [0, 1]; 1 if the length of the run is not known."""
        return self.schedule.ramp

    @property
    def rho_t(self) -> float:
        return self.schedule.rho * self.schedule.ramp

    @property
    def progress(self) -> float:
        return self.schedule.progress

    @progress.setter
    def progress(self, value: float) -> None:
        self.schedule.progress = value

    @property
    def total_steps(self) -> int | None:
        return self.schedule.total_steps

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        self.schedule.total_steps = value

    @property
    def steps(self) -> int:
        self.rollbacks.settle(self)
        return self.schedule.counter.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.schedule.counter.steps = integer("steps", value, 0, INT64)

    def set_step(self, step: int, total_steps: int | None = None) -> None:
        """Set the optimizer step of the run, where the library cannot count (FSDP1, DeepSpeed) or a run is resumed."""
        step = integer("step", step, 0, INT64)
        if total_steps is not None:
            self.schedule.total_steps = total_steps
        self.schedule.origin = (0.0, 0)
        if step != self.steps:
            self.steps = step
            self._on_steps_changed()
        self._note_placed()

    # ---- noise ----

    @property
    def sample(self) -> int:
        return self.noise.sample

    @sample.setter
    def sample(self, value: int) -> None:
        self.noise.sample = value

    @property
    def seed(self) -> int:
        return self.noise.seed

    @seed.setter
    def seed(self, value: int) -> None:
        self.noise.seed = value

    @property
    def rank(self) -> int:
        self._find_mesh()
        return self.noise.rank

    @rank.setter
    def rank(self, value: int | None) -> None:
        self.noise.rank = value

    @property
    def enabled(self) -> bool:
        return self.overrides.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.overrides.enabled = value

    def override(self, **changes: Any) -> AbstractContextManager[None]:
        """`perturbed` and `unperturbed`, in this thread."""
        return self.overrides.override(**changes)

    def draw(self, device: torch.device) -> tuple[Tensor, int]:
        """The key of the noise, and the sample, for the forward that runs in this thread.

        The key is the int64 tensor (seed with the rank mixed in, sample). The first training forward after a backward
        takes a new sample; a recompute has that of its first forward.
        """
        sample = self.records.current().sample
        if is_capturing(device):
            return self.graph.key(device, sample), sample
        return self.noise.key(device, self.records.seed(), sample), sample

    def rho_of(self, adapters: list[str], device: torch.device) -> float | Tensor:
        """The largest rho_t of these flat adapters: a number, or a tensor where a CUDA graph is being captured."""
        if adapters and is_capturing(device):
            return self.graph.rho_t(device, max(adapters, key=self.schedule.rhos.__getitem__))
        return self.records.strength(adapters)

    def backend(self, device: torch.device) -> str:
        """Name of the noise backend on this device."""
        return self.noise.backend(device)

    # ---- layers ----

    @property
    def model(self) -> nn.Module | None:
        """The model whose layers these are; None if it does not exist anymore."""
        return self.registry.model

    def flat_layers(self) -> Iterator[tuple[str, Any]]:
        """(name in the model, layer) of the layers that this perturbs."""
        return self.registry.named()

    # ---- what passes report ----

    def on_pass_begin(self, module: nn.Module) -> None:
        """The outermost module of a pass is entered.

        Raises:
            RuntimeError: DeepSpeed makes the optimizer's steps, and the method cannot see them.
        """
        self.registry.bind(module)
        self.rollbacks.settle(self, at_last=torch.is_grad_enabled())
        join_calling_parts(self)
        self._find_mesh()
        engine = calling_deepspeed()
        if engine is None:
            if not self.leader.seen and not self.steps and self._needs_steps():
                self.diagnostics.check_steps_observed(self._is_stepping)
            return
        self.follow_engine(engine)
        self._on_steps_changed()

    def follow_engine(self, engine: Any) -> None:
        """A DeepSpeed engine trains the model: it counts the steps.

        Raises:
            RuntimeError: the method needs to see its steps, and cannot.
        """
        if engine is not self.schedule.counter.engine:
            if self.settings.method.uses_gradients:
                observe_engine(self, engine)
            self.schedule.counter.follow(engine)

    def on_pass_end(self, layers: set[int], outputs: list[Tensor]) -> None:
        """A training pass ends: the numbers of the layers that ran, and the outputs that require a gradient."""
        self._has_trained = True
        if self.enabled and self.rho > 0:
            self.diagnostics.note_bypassed(layers, outputs)

    def record_of_pass(self) -> PassRecord:
        return self.records.of_pass()

    # ---- what optimizers report ----

    @property
    def counts_steps(self) -> bool:
        """Whether the optimizer's steps are seen. They are not if it holds other parameters than the model (FSDP1)."""
        return self.leader.seen or self.schedule.counter.engine is not None

    def on_step_begin(self, optimizer: Optimizer) -> None:
        self.rollbacks.settle(self, at_last=True)
        self.leader.begin(optimizer, self.steps)

    def on_gradients_ready(self, optimizer: Optimizer) -> None:
        """The gradients are those that the optimizer is about to use."""
        method, active = self.settings.method, self.rho > 0
        if not self.whole.is_held and not self._leads(optimizer):
            if active:
                self.diagnostics.check_single_optimizer(method, optimizer)
            return
        if self.leader.prepared or overflowed(optimizer) or self._only_creates_state(optimizer):
            return
        self.leader.prepared = True
        if active and self.enabled:
            self.diagnostics.check_layers_run()
            self.diagnostics.check_train_mode()
        if active and method.uses_gradients:
            self.check_readable()
            self.schedule.warn_of_unknown_length()
        method.before_step(self, optimizer)

    def on_step_end(self, optimizer: Optimizer) -> None:
        """Count the step, if it is one of the adapter's optimizer."""
        nested = self.leader.is_nested(optimizer, self.steps)
        counted = self.schedule.counter.engine is not None or nested
        if counted or overflowed(optimizer) or self._only_creates_state(optimizer):
            return
        if not self._leads(optimizer):
            self.leader.note_other(optimizer)
        elif self.leader.shares_step(optimizer, self.diagnostics.has_trained()):
            self.leader.prepared = False
        else:
            method = self.settings.method
            if method.uses_gradients and not self.leader.prepared and self.rho > 0:
                refuse_unused_closure(method, optimizer)
            self.leader.count(optimizer)
            self.steps += 1
            self.rollbacks.placed = False
            self._on_steps_changed()
            self._begin_interval()
            method.after_step(self, optimizer)

    def on_engine_step_end(self, optimizer: Optimizer) -> None:
        """A DeepSpeed engine has made a step."""
        if self.rho > 0 and not self.leader.prepared:
            refuse_unknown_optimizer(self.settings.method, optimizer)
        self.leader.prepared = False
        self._on_steps_changed()
        self._begin_interval()
        self.settings.method.after_step(self, optimizer)

    def noise_position(self) -> NoisePosition:
        return NoisePosition(self.noise.sample, self.noise.sample_used)

    def repeat_noise(self, position: NoisePosition, optimizer: Optimizer) -> None:
        """The closure of a step runs again: with the noise from this position.

        Raises:
            RuntimeError: the method computes its perturbation from the gradients of a step, and there are several.
        """
        method = self.settings.method
        if method.uses_gradients and self.rho > 0 and self._leads(optimizer):
            raise RuntimeError(
                f"{type(optimizer).__name__} calls its closure several times in a step, and {type(method).__name__} is "
                "defined for one gradient per step. Use an optimizer that calls it once, or FlatLoraConfig."
            )
        self._set_noise_position(position)

    def position(self) -> RunPosition:
        """Where the run is."""
        return RunPosition(self.steps, self.noise_position(), self.schedule.origin)

    def set_position(self, position: RunPosition) -> None:
        """Continue from a position where the run has been."""
        self.steps, self.schedule.origin = position.steps, position.origin
        self._set_noise_position(position.noise)
        self._on_steps_changed()
        self._begin_interval()

    def check_readable(self) -> None:
        """Check that the method can read the factors and their gradients.

        Raises:
            RuntimeError: FSDP1 divides them.
        """
        self.whole.check(self.registry.first_factor(), type(self.settings.method).__name__)

    def _find_mesh(self) -> None:  # weights are split before the first pass
        if self.noise.mesh is None and not self._has_trained and self.model is not None:
            self.noise.mesh = mesh_of(self.model)

    def _leads(self, optimizer: Optimizer) -> bool:
        trained = self.diagnostics.has_trained()
        leads = self.leader.leads(optimizer, self.registry.factors(), trained)
        if leads:
            self.rollbacks.watch(self, optimizer, self._interval_start, self.registry.factors())
        return leads

    def _only_creates_state(self, optimizer: Optimizer) -> bool:
        return not self.diagnostics.has_trained() and creates_state(optimizer)

    def _is_stepping(self) -> bool:
        """Whether an optimizer of the adapter has begun a step."""
        return any(self._leads(optimizer) for optimizer in self.leader.begun())

    def _needs_steps(self) -> bool:
        """Whether anything depends on the number of optimizer steps."""
        by_steps = self.noise.by_steps or self.settings.method.uses_gradients
        return self.rho > 0 and (by_steps or self.schedule.ramps_by_steps())

    def _begin_interval(self) -> None:
        self.diagnostics.begin_interval()
        self._interval_start = self.position()

    def _note_placed(self) -> None:
        self.rollbacks.placed, self._interval_start = True, self.position()

    def _set_noise_position(self, position: NoisePosition) -> None:
        self.noise.sample, self.noise.sample_used = position

    def _on_steps_changed(self) -> None:
        if self.noise.by_steps:
            self.noise.sample = self.steps

    # ---- saving, copying, closing ----

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue with the same perturbation.

        These are plain numbers, and with the keys "tensors" and "method" what the method keeps (nothing for Flat-LoRA).
        `accelerator.register_for_checkpointing(perturbation(model))` saves and loads it with the rest.
        """
        self.rollbacks.settle(self)
        return {
            "seed": self.seed,
            "sample": self.sample,
            "sample_used": self.noise.sample_used,
            "steps": self.steps,
            "total_steps": self.total_steps,
            "origin": list(self.schedule.origin),
            "rhos": dict(self.rhos),
            "tensors": self.registry.tensors(),
            "method": self.method_state.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Nothing is changed unless all of `state` is right.

        Raises:
            ValueError: an entry is missing, wrong, or of an adapter or a layer that this model does not have.
        """
        known = check_state(state, self.rhos, self.registry, self.method_state)
        self.seed = known["seed"]
        self._set_noise_position(NoisePosition(known["sample"], known["sample_used"]))
        self.steps, self.total_steps, self.schedule.origin = known["steps"], known["total_steps"], known["origin"]
        self._note_placed()
        self.rhos.update(known["rhos"])
        self.registry.load_tensors(known["tensors"])
        self.method_state.load_state_dict(known["method"])

    def tensors(self) -> dict[str, Tensor]:
        """What the method keeps in the layers, with names ``layer.factor.adapter``; not copies."""
        return self.registry.tensors()

    def close(self, model: nn.Module | None = None) -> None:
        """Remove every hook, also those in `model` that came with a copy of a part of the model."""
        self.passes.close(model)
        self.registry.take_all()
        ignore(self)

    def is_copied_with_its_model(self, memo: dict[int, Any]) -> bool:
        """In a `copy.deepcopy`: whether the whole model is copied, and not a part of it."""
        model = self.model
        if model is None or id(model) in memo:
            return True
        # if a part of the model is in the memo, the copy has not come to the model
        return not any(id(module) in memo for module in model.modules())

    def __deepcopy__(self, memo: dict[int, Any]) -> Perturbation:
        if not self.is_copied_with_its_model(memo):
            return self
        new: Perturbation = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied = memo.get(id(self.model))
        if copied is not None:
            new.registry.set_model(copied)
        return new


def check_same_settings(found: Perturbation, settings: Settings) -> None:
    """Check that a model gets the settings that it has already.

    Raises:
        ValueError: the settings are not those of the model's flat adapters. They may differ in rho only.
    """
    for name, value in vars(settings).items():
        known = getattr(found.settings, name)
        if value != known:
            raise ValueError(
                f"{name} is {known!r} for the flat adapters that this model has, got {value!r}: a model has one "
                "schedule and one seed. Give this config the same value (rho may differ)."
            )
