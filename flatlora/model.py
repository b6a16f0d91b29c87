"""From a model to a flat one and back: the functions a user calls."""

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

from .adoption import abandon, adopt, release
from .config import (
    HUB_OPTIONS,
    FlatLoraConfig,
    PerturbedLoraConfig,
    known_classes,
    load_own,
    plain_copy,
    settings_of,
)
from .layer import flat_layers
from .parts import perturbations
from .passes import of_model, root_of
from .settings import CHECKS, Settings
from .state import Perturbation
from .utils import arguments
from .utils.arguments import WrongType, boolean, integer, keywords, shown, text, texts

logger = logging.getLogger(__name__)

OF_PEFT = {  # keywords that peft takes when it loads an adapter
    *(signature(PeftModel.from_pretrained).parameters.keys() | signature(PeftModel.load_adapter).parameters.keys())
    - {"model", "model_id", "self", "config", "kwargs"},  # `config` is what we make
    *("subfolder", "use_auth_token", "use_safetensors", "ignore_mismatched_sizes"),
    *("device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"),
}


def get_flat_peft_model(
    model: nn.Module, config: PerturbedLoraConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """[`peft.get_peft_model`] for a [`FlatLoraConfig`] or the configuration of another method of `flatlora.methods`:
    the model with LoRA adapters that train perturbed.

    `peft.get_peft_model(model, config)` gives the same; this one refuses a plain config.

    Args:
        model: the model to adapt; modified in place, as by peft.
        config: the adapter and its perturbation.
        adapter_name: name of the adapter.
        kwargs: passed on to `peft.get_peft_model`.

    Returns:
        peft's own `PeftModel` (or its subclass for the task).

    Raises:
        TypeError: `config` is not one of ours.
        ValueError: no layer matched, or a targeted layer cannot be perturbed. The model is then as it was.
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
        return peft.get_peft_model(model, config, adapter_name=adapter_name, **kwargs)
    except BaseException:
        try:
            _take_back(model, before)
        except Exception:  # the first error is the one to be seen
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
    """Perturb the training of a model whose LoRA or AdaLoRA adapters peft has already made.

    Args:
        model: a `PeftModel`, or any model with LoRA layers in it.
        adapter_names: the adapters that become flat; default all of them. With names the model may have flat adapters
            already, whose settings other than rho must then be given again.
        rho, schedule, total_steps, resample, seed, backend, on_unsupported: see [`FlatLoraConfig`].

    Returns:
        `model`.

    Raises:
        ValueError: it has no LoRA layer or no adapter of that name, it is flat already, or a layer cannot be
            perturbed. The model is then as it was.
    """
    arguments.module("model", model)
    rho, settings = CHECKS["rho"]("rho", rho), Settings(schedule, total_steps, resample, seed, backend)
    on_unsupported = CHECKS["on_unsupported"]("on_unsupported", on_unsupported)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layer: make one with get_flat_peft_model")
    chosen = _choose(model, layers.values(), adapter_names)
    before = perturbation(model) if any(flat_layers(model)) else None
    state = Perturbation.shared(root_of(model), settings)
    state.passes.watch(model)
    adopted = []
    try:
        for name, layer in layers.items():
            for adapter in chosen & layer.scaling.keys():
                if adopt(layer, adapter, state, rho, on_unsupported, name):
                    adopted.append((layer, adapter))
    except ValueError:
        for layer, adapter in adopted:
            abandon(layer, adapter)
        if before is None:
            state.close()
        raise
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take the noise away: layers, hooks and configs are again those of plain peft; the adapters stay as trained.

    Raises:
        ValueError: the model is not flat.
    """
    states = flat_parts(model)
    for layer in list(flat_layers(model)):
        release(layer)
    for state in states:
        if not state.layers_alive():  # of a part of a model the rest stays flat
            state.close(model)
    for module in model.modules():
        configs: Any = getattr(module, "peft_config", None) or {}
        for name, config in configs.items():
            if isinstance(config, PerturbedLoraConfig):
                configs[name] = plain_copy(config)
    return model


def perturbation(model: nn.Module) -> Perturbation:
    """The noise of a flat model: `.rho`, `.rho_t`, `.progress`, `.sample`, `.seed`, `.enabled`.

    Raises:
        ValueError: the model has no flat layer.
    """
    states = flat_parts(model)
    if len(states) > 1:
        names = sorted({_differences(states[0], other) for other in states[1:]})
        raise ValueError(
            f"the parts of {type(model).__name__} were adapted with different settings ({', '.join(names)}), so that "
            "they have no perturbation in common. Give them the same, or ask for that of a part, perturbation(part)."
        )
    return states[0]


def unperturbed(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager: no noise inside, in training mode too; in this thread."""
    return _override(model, enabled=False)


def perturbed(model: nn.Module, sample: int | None = None) -> AbstractContextManager[None]:
    """Context manager: noise of the present strength rho_t inside, in evaluation mode and under `no_grad` too; in this
    thread.

    Averaging the loss over several samples estimates the objective of Flat-LoRA, E_eps L(W + sBA + eps).

    Args:
        model: a flat model.
        sample: index of the noise sample; default the current one. The sample of training is not advanced.
    """
    sample = integer("sample", sample, 0, 2**32 - 1, optional=True, expected="None or an integer in [0, 2^32)")
    return _override(model, forced=True, sample=sample)


def load(model: nn.Module, path: str, adapter_name: str = "default", is_trainable: bool = True, **kwargs: Any):
    """[`PeftModel.from_pretrained`] that brings an adapter back perturbed as it was trained.

    Args:
        model: the base model; or a `PeftModel`, which the adapter is then added to, not active.
        path: what `save_pretrained` wrote: a folder or a hub name.
        adapter_name: name of the adapter.
        is_trainable: as in peft; True here, since an adapter for inference needs no noise.
        kwargs: settings (`rho`, `seed`, ...) in place of those in the files; the others are passed on to
            `PeftModel.from_pretrained` (of a `PeftModel`: to `load_adapter`).

    Raises:
        ValueError: it was saved without noise settings and `rho` is not given, a file is damaged, or the model has
            layers that a plain LoraConfig made.
        TypeError: a keyword that neither a configuration nor peft nor the hub knows.
    """
    arguments.module("model", model)
    arguments.path("path", path)
    text("adapter_name", adapter_name, empty=False)
    is_trainable = boolean("is_trainable", is_trainable)
    where = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS | {"subfolder"}}
    own = load_own(path, **where)
    kind = FlatLoraConfig if own is None else known_classes()[own.get("config_class", "FlatLoraConfig")]
    keywords("load", kwargs, settings_of(kind) | HUB_OPTIONS | OF_PEFT)
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
    """The perturbations of a model: one, unless its parts were adapted with settings of their own."""
    found = perturbations(arguments.module("model", model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no flat LoRA layer: make it with get_flat_peft_model, or call attach on it"
        )
    return found


def _differences(first: Perturbation, second: Perturbation) -> str:
    values = vars(first.settings) | {"rho": first.rhos}
    others = vars(second.settings) | {"rho": second.rhos}
    return ", ".join(
        f"{name}: {values[name]!r} and {others[name]!r}" for name in values if values[name] != others[name]
    )


def _override(model: nn.Module, **changes: Any) -> AbstractContextManager[None]:
    return _override_all(flat_parts(model), changes)


@contextmanager
def _override_all(states: list[Perturbation], changes: dict[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for state in states:
            stack.enter_context(state.override(**changes))
        yield


def _choose(model: nn.Module, layers: Iterable[Any], names: Sequence[str] | None) -> set[str]:
    """The adapters that `attach` is to make flat."""
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


def _take_back(model: nn.Module, before: set[nn.Module]) -> None:
    """Put the base layers back where an injection that failed half-way has replaced them."""
    for name, module in list(model.named_modules()):
        inside = ".base_layer." in f".{name}."  # of a layer that has been put back
        if isinstance(module, LoraLayer) and module not in before and not inside:
            unload = getattr(module, "unload_and_optionally_merge_module", None)
            own = unload and unload(merge=False, safe_merge=False, adapter_names=None)  # what it has adapted inside
            model.set_submodule(name, own or module.get_base_layer())
    left = of_model(model)
    if left is not None and not any(flat_layers(model)):
        left.close()
