"""The state that all layers of a model share: seed and noise sample, and, in `strength.py`, strength and schedule."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint
from .arguments import INT64, SEED, Checked, boolean, integer
from .checks import check_alone, check_mode, check_reached, check_seen
from .ops import resolve_backend
from .ops.library import OBSERVERS
from .ops.philox import mix_rank
from .passes import Passes, entrances, in_backward, of_model
from .settings import Settings
from .spread import calling_deepspeed, global_rank, is_deepspeed, is_sharded
from .steps import overflowed, unwatch, watch
from .strength import Strength

_numbers = itertools.count(1)


class PassNote(NamedTuple):
    """What a recompute must know of its forward."""

    sample: int
    forced: bool  # by `perturbed(...)`
    enabled: bool


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
    enabled = Checked(boolean)

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        super().__init__(settings)
        self.sample = 0
        self.seed = torch.initial_seed() if settings.seed is None else settings.seed
        self.enabled = True
        self.layers = 0  # noise streams handed out
        self.sees_steps = False  # an optimizer step has been seen: there will be no other way to change parameters
        self._rank: int | None = None
        self.ascended = False  # a first pass of two has been made for the coming optimizer step
        self.climber: torch.optim.Optimizer | None = None  # of Bi-LoRA's second module
        self.climber_state: dict[str, Any] | None = None  # loaded, for when it is made
        self.interval = 0  # optimizer steps that ended here: what came since the last one is in this interval
        self.reached = 0  # flat layers that have run in this interval
        self.passes_before = (0, 0)  # that had begun when this interval did, and of these with gradients
        self.witness: tuple = (None, None)  # the anchor and its value, see `checks.check_seen`
        self.flat_layer_count: int | None = None  # as last counted
        self.compiled = False  # a flat layer has been compiled: whether it runs is not seen
        self.trained = self.evaluated = False  # perturbed and evaluating passes, with gradients, in this interval
        self.warned_of: set[str] = set()
        self._prepared = False  # the method has been told of the optimizer step that is being made
        self._stale = False  # a backward has used the sample: the next training forward takes a new one
        self._window, self._pass_of_window = (0, 0), -1  # of unchanged factors, and the pass that was last asked about
        self._backward_ran = False  # since that pass began
        self._forced: tuple[int | None] | None = None  # sample of `perturbed(...)`, which also forces the noise on
        self._key: tuple[tuple, Tensor] | None = None  # the last one; a key is never written again
        self._weights: list[tuple[weakref.ref, int]] = []  # a tied weight keeps one noise stream
        self._began: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # optimizer -> steps when its own began
        self.passes = Passes(self, self._note)
        for module in entrances(model):
            self.passes.watch(module)
        self._enrol()

    @classmethod
    def shared(cls, model: nn.Module, settings: Settings) -> Perturbation:
        """The perturbation of this model, made if there is none.

        Raises:
            ValueError: there is one with other settings. Adapters of one model may differ in rho, in nothing else.
        """
        state = of_model(model)
        if state is None:
            return cls(model, settings)
        for name, value in vars(settings).items():
            known = getattr(state.settings, name)
            if value != known:
                raise ValueError(
                    f"{name} is {known!r} for the flat adapters that this model has, got {value!r}: the noise of a "
                    "model has one schedule and one seed. Give this config the same value (rho may differ)."
                )
        return state

    @property
    def rank(self) -> int:
        return global_rank() if self._rank is None else self._rank

    @rank.setter
    def rank(self, value: int | None) -> None:
        self._rank = integer("rank", value, 0, 2**32 - 1, optional=True)

    # ---- which noise ----

    def drawn(self) -> tuple[int, int]:
        """Seed, with the rank mixed in, and sample of the noise for the forward that asks, a training forward or one
        inside `perturbed`.

        A new sample is taken at the first training forward after a backward; a recompute takes the sample of its own
        forward.
        """
        recalled = self.passes.recalled()
        if recalled is not None:
            sample = recalled.sample
        else:
            if self._forced is None and not in_backward():
                self._take_new_sample()
            sample = self._note().sample
        return mix_rank(self.seed, self.rank), sample

    def draw(self, device: torch.device) -> tuple[Tensor, int]:
        """The same as the int64 tensor (seed, sample), the key, and the sample."""
        seed, sample = self.drawn()
        source = seed, sample & 0xFFFFFFFF, device, torch.is_inference_mode_enabled()
        if self._key is None or self._key[0] != source:
            key = self.empty_key(device)
            key[0], key[1] = source[:2]  # two fills: no copy from the host
            self._key = source, key
        return self._key[1], sample

    def empty_key(self, device: torch.device) -> Tensor:
        """Room for a key: where the kernel reads it, on the CPU for the backends that read it there."""
        return torch.empty(2, dtype=torch.int64, device=device if self.backend(device) == "triton" else "cpu")

    def window(self) -> tuple:
        """Another one whenever A and B can have changed, unseen as well (by `.data`, in FSDP1's flattened copy): at
        each optimizer step and each pass, but for passes that follow a backward, which accumulate gradients."""
        count = self.passes.count
        if count != self._pass_of_window:
            if not (self.sees_steps and self._backward_ran and self._window[0] == self.steps):
                self._window = self.steps, count
            self._pass_of_window, self._backward_ran = count, False
        return self.steps, self._window

    def backward_began(self) -> None:
        """Told by every perturbed layer's gradient: the sample has been used."""
        self._backward_ran = True
        if self.settings.resample == "forward":
            self._stale = True

    @property
    def forced(self) -> bool:
        """Inside `perturbed(...)`, where every pass is perturbed."""
        return self._forced is not None

    def backend(self, device: torch.device) -> str:
        """Name of the noise backend on this device."""
        return resolve_backend(self.settings.backend, device)

    def wants_noise(self, training: bool) -> bool:
        """Is a forward of a layer (in training mode or not) to be perturbed? A recompute is what its forward was."""
        recalled = self.passes.recalled()
        # the sample is not looked at here: compiled code would have to be compiled again for each
        enabled = self.enabled if recalled is None else recalled.enabled
        forced = self.forced if recalled is None else recalled.forced
        return enabled and (forced or (training and self.passes.with_gradients()))

    def _note(self) -> PassNote:
        sample = self._forced[0] if self._forced is not None and self._forced[0] is not None else self.sample
        return PassNote(sample, self.forced, self.enabled)

    def _take_new_sample(self) -> None:
        if self.passes.first_use() and self._stale:
            self.sample, self._stale = self.sample + 1, False
        self._warn_of_length()

    # ---- the optimizer's steps ----

    def pass_begins(self) -> None:
        """Does DeepSpeed make the optimizer's steps?

        Raises:
            RuntimeError: it does, and the method needs to see them.
        """
        engine, steps = calling_deepspeed(), self.steps
        if engine is None:
            return check_seen(self)
        if self.settings.method.uses_gradients and self.rho > 0:
            self.refuse_shards(engine)
        if engine is not self._engine:
            self._engine = engine
            self.steps = steps  # as many as before: from here on the engine counts
        self._after_step()

    @property
    def counts_steps(self) -> bool:
        """Are the optimizer's steps seen here? Not where it holds other parameters than the model (FSDP1)."""
        return self.sees_steps or self._engine is not None

    def step_began(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of this process begins a step."""
        self._began[optimizer] = self.steps

    def gradients_are_there(self, optimizer: torch.optim.Optimizer) -> None:
        """What the optimizer is about to use: from before the step, or from the closure that it has just called."""
        if not self._holds_adapter(optimizer):
            check_alone(self, optimizer)
        elif not self._prepared and not overflowed(optimizer):
            self._prepared = True
            if self.rho > 0:
                check_reached(self)
                check_mode(self)
            if self.settings.method.uses_gradients and self.rho > 0:
                self.refuse_shards()
                self._warn_of_length()
            self.settings.method.before_step(self, optimizer)

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
        if self._engine is None and self._holds_adapter(optimizer) and not inside and not overflowed(optimizer):
            if self.settings.method.uses_gradients and not self._prepared and self.rho > 0:
                raise RuntimeError(
                    f"{type(optimizer).__name__} was given a closure and did not call it, so "
                    f"{type(self.settings.method).__name__} has not seen the gradients: call backward before "
                    "optimizer.step() and pass no closure"
                )
            self.steps, self.sees_steps, self._prepared = self.steps + 1, True, False
            self.interval, self.reached, self.trained, self.evaluated = self.interval + 1, 0, False, False
            self.passes_before = self.passes.count, self.passes.recorded
            self._after_step()
            self.settings.method.after_step(self, optimizer)

    def is_stepping(self) -> bool:
        """Has an optimizer of the adapter begun a step?"""
        return any(self._holds_adapter(optimizer) for optimizer in self._began)

    def noise_position(self) -> tuple[int, bool]:
        """Where the noise is, for `repeat_noise`."""
        return self.sample, self._stale

    def repeat_noise(self, position: tuple[int, bool], optimizer: torch.optim.Optimizer) -> None:
        """The closure of a step runs once more: from the same noise again.

        Raises:
            RuntimeError: the method makes its perturbation from the gradients of a step, and there are several.
        """
        method = self.settings.method
        if method.uses_gradients and self.rho > 0 and self._holds_adapter(optimizer):
            raise RuntimeError(
                f"{type(optimizer).__name__} calls its closure several times in a step, and {type(method).__name__} is "
                "defined for one gradient a step. Use an optimizer that calls it once, or FlatLoraConfig."
            )
        self.sample, self._stale = position

    def _after_step(self) -> None:
        if self.settings.resample == "step":
            self.sample = self.steps

    def flat_layers(self) -> Iterator[tuple[str, Any]]:
        """(name in the model, layer) of the layers that this perturbs."""
        for name, module in self.model.named_modules():
            if module.__dict__.get("perturbation") is self:
                yield name, module

    def factors(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of the adapters in the layers that this perturbs."""
        for _, layer in self.flat_layers():
            for name, parameter in layer.named_parameters():
                if "lora_" in name and parameter.requires_grad:
                    yield parameter

    def anchor(self) -> nn.Parameter | None:
        """One trainable adapter parameter: the optimizer that holds it is the one whose steps count."""
        return next(self.factors(), None)

    def _holds_adapter(self, optimizer: torch.optim.Optimizer) -> bool:
        anchor = self.anchor()
        return any(p is anchor for group in optimizer.param_groups for p in group["params"])

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

    def _enrol(self) -> None:
        self.number = next(_numbers)  # names this object in compiled code
        OBSERVERS[self.number] = self
        watch(self)

    def close(self) -> None:
        """Take every hook away."""
        self.passes.close()
        unwatch(self)

    def __getstate__(self) -> dict[str, Any]:
        # these hold weak references, and are made anew
        dropped: dict[str, Any] = {"_began": None, "_engine": None, "_weights": []}
        dropped["_counted"] = self.steps
        return {**self.__dict__, **dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._began = weakref.WeakKeyDictionary()
        self._enrol()
