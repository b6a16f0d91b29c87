"""The functions that a user calls."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from inspect import signature
from typing import Any

import peft
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from .config import (
    CHECKS,
    DEFAULT_CLASS,
    HUB_OPTIONS,
    PerturbedLoraConfig,
    Settings,
    known_classes,
    load_own,
    lora_config_of,
    settings_of,
)
from .layers.convert import make_flat, make_plain, release, undo_make_flat
from .layers.flat_layer import flat_layers
from .methods.flat_lora import FlatLora, FlatLoraConfig
from .methods.two_pass import TwoPass
from .training.first_pass import first_pass
from .training.forward_passes import listener_of, root_of
from .training.model_parts import perturbations, point
from .training.perturbation import Perturbation
from .training.prediction import MOST_SAMPLES, AveragedPrediction
from .utils import arguments
from .utils.arguments import WrongType, boolean, choice, integer, keywords, shown, text, texts

logger = logging.getLogger(__name__)

# keywords of peft's functions that load an adapter; `config` is created here
PEFT_OPTIONS = {
    *(signature(PeftModel.from_pretrained).parameters.keys() | signature(PeftModel.load_adapter).parameters.keys())
    - {"model", "model_id", "self", "config", "kwargs"},
    *("subfolder", "use_auth_token", "use_safetensors", "ignore_mismatched_sizes"),
    *("device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"),
}


def get_flat_peft_model(
    model: nn.Module, config: PerturbedLoraConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """[`peft.get_peft_model`] for a [`FlatLoraConfig`] or the configuration of another method of `flatlora.methods`.

    `peft.get_peft_model(model, config)` returns the same; this function refuses a plain configuration.

    Args:
        model: the model to adapt; modified in place, as by peft.
        config: configuration of the adapter and its perturbation.
        adapter_name: name of the adapter.
        kwargs: passed on to `peft.get_peft_model`.

    Returns:
        a `PeftModel` of peft (or its subclass for the task), whose LoRA adapters train with the perturbation.

    Raises:
        TypeError: `config` is not a configuration of this library.
        ValueError: no layer matches, or a targeted layer cannot be perturbed. The model is then as it was.
    """
    arguments.module("model", model)
    if not isinstance(config, PerturbedLoraConfig):
        raise WrongType(
            f"config must be a FlatLoraConfig, got {type(config).__name__} ({shown(config)}). For a plain adapter use "
            "peft.get_peft_model; to perturb the training of an adapter that exists, flatlora.attach."
        )
    text("adapter_name", adapter_name, empty=False)
    keywords("get_flat_peft_model", kwargs, signature(peft.get_peft_model).parameters)
    config.check()
    before = set(model.modules())
    try:
        made: PeftModel = peft.get_peft_model(model, config, adapter_name=adapter_name, **kwargs)
        return made
    except BaseException:
        try:
            _undo_injection(model, before)
        except Exception:  # the user must see the first error
            logger.warning("the model could not be put back as it was", exc_info=True)
        raise


def attach(
    model: nn.Module,
    *,
    rho: float = 0.05,
    schedule: str = "cosine",
    total_steps: int | None = None,
    resample: str = "forward",
    seed: int | None = None,
    backend: str = "auto",
    on_unsupported: str = "error",
    adapter_names: Sequence[str] | None = None,
) -> nn.Module:
    """Perturb the training of a model that has LoRA or AdaLoRA adapters from peft.

    Args:
        model: a `PeftModel`, or any model with LoRA layers in it.
        adapter_names: the adapters that become flat; default all of them. With names, the model may already have flat
            adapters; then their settings other than rho must be passed again.
        rho, schedule, total_steps, resample, seed, backend, on_unsupported: see [`FlatLoraConfig`].

    Returns:
        `model`.

    Raises:
        ValueError: the model has no LoRA layer or no adapter of that name, it is flat already, or a layer cannot be
            perturbed. The model is then as it was.
    """
    arguments.module("model", model)
    rho = CHECKS["rho"]("rho", rho)
    settings = Settings(FlatLora(), schedule, total_steps, resample, seed, backend)
    attach_method(model, settings, rho, CHECKS["on_unsupported"]("on_unsupported", on_unsupported), adapter_names)
    return model


def attach_method(
    model: nn.Module, settings: Settings, rho: float, on_unsupported: str, adapter_names: Sequence[str] | None
) -> None:
    """What `attach` does, for any method. The arguments have been checked, apart from the names."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layer: create one with get_flat_peft_model")
    chosen = _choose_adapters(model, layers.values(), adapter_names)
    before = perturbation(model) if any(flat_layers(model)) else None
    state = Perturbation.shared(root_of(model), settings)
    state.passes.watch(model)
    converted: list[tuple[Any, str]] = []
    try:
        for name, layer in layers.items():
            for adapter in chosen & layer.scaling.keys():
                # one by one, so that an error leaves the list of those to undo
                if make_flat(layer, adapter, state, rho, on_unsupported, name):
                    converted.append((layer, adapter))  # noqa: PERF401
    except ValueError:
        for layer, adapter in converted:
            undo_make_flat(layer, adapter)
        if before is None:
            state.close()
        raise


def detach(model: nn.Module) -> nn.Module:
    """Remove the perturbation, and keep the values of the adapters.

    Layers, hooks and configurations are those of peft again.

    Raises:
        ValueError: the model is not flat.
    """
    states = flat_parts(model)
    for layer in list(flat_layers(model)):
        make_plain(layer)
    for state in states:
        # if a part of a model is detached, the rest stays flat
        if state.registry.alive():
            release(state, [], model)
        else:
            state.close(model)
    for module in model.modules():
        configs: Any = getattr(module, "peft_config", None) or {}
        for name, config in configs.items():
            if isinstance(config, PerturbedLoraConfig):
                configs[name] = lora_config_of(config)
    return model


def perturbation(model: nn.Module) -> Perturbation:
    """The perturbation of a flat model: `.rho`, `.rho_t`, `.progress`, `.sample`, `.seed`, `.enabled`.

    Raises:
        ValueError: the model has no flat layer.
    """
    states = flat_parts(model)
    if len(states) > 1:
        names = sorted({_differences(states[0], other) for other in states[1:]})
        raise ValueError(
            f"the parts of {type(model).__name__} have different settings, or are at different points of their runs "
            f"({', '.join(names)}), so they have no common perturbation. Adapt them with the same settings before they "
            "train, or call perturbation(part) for each part."
        )
    return states[0]


def unperturbed(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager that switches the noise off in this thread, also in training mode."""
    return _override(flat_parts(model), enabled=False)


def perturbed(model: nn.Module, sample: int | None = None, rho: float | None = None) -> AbstractContextManager[None]:
    """Context manager that switches the noise on in this thread, also in evaluation mode and under `no_grad`.

    The mean loss over several samples estimates the objective of Flat-LoRA, E_eps L(W + sBA + eps). Inside another
    context of this library, the inner one holds. `perturbation(model).enabled = False` and adapters that are merged or
    disabled leave nothing to perturb.

    Args:
        model: a flat model.
        sample: index of the noise sample; default the current one. The sample of training does not change, so a loop
            that trains inside passes one for each step.
        rho: strength; default the present one, rho_t, which is 0 at the start of a growing schedule.

    Raises:
        ValueError: the model has no flat layer, or an argument is out of its bounds.
        TypeError: `sample` or `rho` is given, and the method of the model has no random noise: its perturbation comes
            from gradients, and is as it is.
    """
    sample = integer("sample", sample, 0, 2**32 - 1, optional=True, expected="None or an integer in [0, 2^32)")
    rho = None if rho is None else CHECKS["rho"]("rho", rho)
    states = flat_parts(model)
    for state in states:
        for name, value in (("sample", sample), ("rho", rho)):
            if value is not None and state.settings.method.uses_gradients:
                raise WrongType(
                    f"{name} is for methods with random noise (Flat-LoRA, RWP), and the perturbation of "
                    f"{type(state.settings.method).__name__} comes from gradients, got {name}={value!r}. Leave {name} "
                    "out, or use flatlora.unperturbed(model) for a pass without the perturbation."
                )
    return _override(states, enabled=True, forced=True, sample=sample, rho=rho)


def averaged(
    model: nn.Module, samples: int = 8, *, rho: float | None = None, of: str = "probabilities"
) -> AveragedPrediction:
    """The mean prediction of a trained model over noise in its merged weight.

        p(y | x) = 1/K sum_k softmax(f(x; W + sBA + eps_k)),    eps_k with the strength rho

    The returned function takes the arguments of the model, makes `samples` forward passes without gradients, and
    returns the mean, float32 (float64 for logits in float64): probabilities, or logits before the softmax. Nothing of
    the model is written, and the memory is that of one pass. The samples are the same in every call, and are none of
    those of training. The adapters are to be active and not merged.

        probabilities = flatlora.averaged(model, samples=8)(**batch)  # (..., classes)

    Args:
        model: a flat model in evaluation mode, whose output is a tensor of logits or has `.logits`.
        samples: K, 1 to 2^16.
        rho: strength of the noise; default the rho of the model, whatever its schedule says now.
        of: "probabilities" or "logits".

    Raises:
        TypeError: the method of the model has no random noise; or its output has no logits.
        RuntimeError: the model is in training mode, or no noise is on: the adapters are merged or disabled, rho is 0,
            or the call is inside `unperturbed`. Raised when the function is called.
        ValueError: an argument out of bounds; or, when the function is called, probabilities of a single logit
            (regression, binary classification), where ``of="logits"`` is meant.
    """
    states = flat_parts(model)
    for state in states:
        if state.settings.method.uses_gradients:
            name = type(state.settings.method).__name__
            raise WrongType(
                f"averaged is for methods with random noise (Flat-LoRA, RWP), and {name} has none. Detach the model "
                "and attach it with a rho to average its prediction all the same."
            )
    samples = integer("samples", samples, 1, MOST_SAMPLES)
    of = choice("of", of, ("probabilities", "logits"))
    rho = None if rho is None else CHECKS["rho"]("rho", rho)
    return AveragedPrediction(model, states, samples, rho, of)


def ascent(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager for the first pass of FMLoRA and LoRA-SAM.

    A backward inside is at (A, B). Those after it, until the optimizer's step, are at the perturbed factors.

    Nothing else remains of the pass: `.grad`, the generators of torch, NumPy and Python (so that both passes have the
    same dropout and data masks, and rho = 0 is plain LoRA) and the statistics of batch normalization are what they
    were. With gradient accumulation, either run a first pass for each micro-batch, or run the first passes of all
    micro-batches in one `with` and then all second passes. Under DDP the gradients of the first pass are not averaged:
    each process perturbs by its own batch, as is usual for SAM. Where the adapter is divided among processes (FSDP,
    ZeRO) they are averaged, so that all have the same perturbation. The scale of a GradScaler cancels.

    Args:
        model: a model with an `FMLoraConfig` or a `LoraSamConfig`, also wrapped (DDP, compiled). If something outside
            the adapted model trains too (a head), the module that holds both: gradients elsewhere would add up.

    Raises:
        ValueError: the model has no flat layer.
        TypeError: its method makes one pass.
        RuntimeError: there was no backward inside, or FSDP1 divides the adapter.
    """
    state = perturbation(model)
    method = state.settings.method
    if not isinstance(method, TwoPass):
        raise TypeError(f"ascent is for methods with two passes, and {type(method).__name__} has one")
    state.check_readable()
    return first_pass(model, state, method)


def load(
    model: nn.Module, path: str, adapter_name: str = "default", is_trainable: bool = True, **kwargs: Any
) -> PeftModel:
    """[`PeftModel.from_pretrained`] for an adapter that continues to train with its perturbation.

    Args:
        model: the base model, or a `PeftModel`, to which the adapter is added without being activated.
        path: a folder or hub repository that `save_pretrained` wrote.
        adapter_name: name of the adapter.
        is_trainable: as in peft; default True, because an adapter for inference needs no noise.
        kwargs: settings (`rho`, `seed`, ...) that replace those in the files. The others are passed on to
            `PeftModel.from_pretrained`, or to `load_adapter` of a `PeftModel`.

    Raises:
        ValueError: the adapter was saved without our settings and `rho` is not given, a file is damaged, or the model
            has layers of a plain LoraConfig.
        TypeError: a keyword is unknown to the configuration, to peft and to the hub.
    """
    arguments.module("model", model)
    arguments.path("path", path)
    text("adapter_name", adapter_name, empty=False)
    is_trainable = boolean("is_trainable", is_trainable)
    where = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS | {"subfolder"}}
    own = load_own(path, **where)
    kind = FlatLoraConfig if own is None else known_classes()[own.get("config_class", DEFAULT_CLASS)]
    keywords("load", kwargs, settings_of(kind) | HUB_OPTIONS | PEFT_OPTIONS)
    override = {name: kwargs.pop(name) for name in settings_of(kind) & kwargs.keys()}
    config = kind.from_pretrained(path, **where, **override)
    if isinstance(model, PeftModel):
        config.inference_mode = not is_trainable
        model.add_adapter(adapter_name, config)
        model.set_requires_grad(adapter_name, is_trainable)
        model.load_adapter(path, adapter_name, is_trainable=is_trainable, **kwargs)
        return model
    return PeftModel.from_pretrained(
        model, path, adapter_name=adapter_name, is_trainable=is_trainable, config=config, **kwargs
    )


def flat_parts(model: nn.Module) -> list[Perturbation]:
    """The perturbations of a model: one, unless its parts cannot be joined."""
    found = perturbations(arguments.module("model", model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no flat LoRA layer: create it with get_flat_peft_model, or call attach on it"
        )
    return found


def _differences(first: Perturbation, second: Perturbation) -> str:
    values = point(first) | {"rho": first.rhos}
    others = point(second) | {"rho": second.rhos}
    found = [f"{name}: {values[name]!r} and {others[name]!r}" for name in values if values[name] != others[name]]
    return ", ".join(found or [f"each has made {first.steps} steps alone"])


@contextmanager
def _override(states: list[Perturbation], **changes: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for state in states:
            stack.enter_context(state.override(**changes))
        yield


def _choose_adapters(model: nn.Module, layers: Iterable[Any], names: Sequence[str] | None) -> set[str]:
    """The adapters that `attach` makes flat."""
    known = {adapter for layer in layers for adapter in layer.scaling}
    flat = {adapter for layer in flat_layers(model) for adapter in layer.flat_adapters}
    names = texts("adapter_names", names, "a list of names", optional=True)
    chosen = known if names is None else set(names)
    if not chosen or chosen - known:
        raise ValueError(f"adapter_names must be among the LoRA adapters {sorted(known)}, got {names!r}")
    if chosen & flat or (names is None and flat):
        raise ValueError(
            "the model is flat already: set flatlora.perturbation(model).rho, name the adapters that are not flat in "
            f"adapter_names (flat are {sorted(flat)}), or call flatlora.detach(model) first"
        )
    return chosen


def _undo_injection(model: nn.Module, before: set[nn.Module]) -> None:
    """Put back the base layers that an injection has replaced before it failed."""
    for name, module in list(model.named_modules()):
        # a layer inside one that has been put back
        inside = ".base_layer." in f".{name}."
        if module not in before and isinstance(module, LoraLayer) and not inside:
            unload = getattr(module, "unload_and_optionally_merge_module", None)
            own = unload and unload(merge=False, safe_merge=False, adapter_names=None)
            model.set_submodule(name, own or module.get_base_layer())
    left = listener_of(model)
    if isinstance(left, Perturbation) and not any(flat_layers(model)):
        left.close()
