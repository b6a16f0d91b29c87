"""Flat models from the keys `flat_...` of a configuration file: what axolotl, ms-swift, and TRL's scripts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import Trainer

from ..api import attach_method, flat_parts
from ..config import PerturbedLoraConfig, known_classes, own_fields
from .callback import FlatLoraCallback
from .trainer import TwoPassTrainerMixin

PREFIX = "flat_"


def _key(help: str) -> Any:
    return field(default=None, metadata={"help": help})


@dataclass
class FlatArguments:
    """The keys of all methods, as a dataclass for `transformers.HfArgumentParser` and TRL's `TrlParser`.

    A key that is not set has the default of the method. What each means is documented with the configurations
    ([`FlatLoraConfig`], `flatlora.methods`), whose fields have the same names without `flat_`.
    """

    flat_method: str | None = _key("flatlora (default), rwp, fmlora, efmlora, lora_sam, bilora, or bar.")
    flat_rho: float | None = _key("Strength of the perturbation; 0 is LoRA.")
    flat_schedule: str | None = _key("How the strength follows from flat_rho over the run.")
    flat_total_steps: int | None = _key("Length of the schedule in optimizer steps; default: that of the run.")
    flat_on_unsupported: str | None = _key("'error' or 'warn' for a targeted layer that cannot be perturbed.")
    flat_resample: str | None = _key("flatlora, rwp: a new noise sample each 'forward' or 'step'.")
    flat_seed: int | None = _key("flatlora, rwp, bilora: seed of the noise, or of the ascent factors.")
    flat_backend: str | None = _key("flatlora, rwp: implementation of the noise.")
    flat_space: str | None = _key("rwp: noise in the 'merged' weight, or in the 'adapter'.")
    flat_rtol: float | None = _key("fmlora, efmlora: relative cutoff of the pseudo-inverses.")
    flat_beta: float | None = _key("efmlora: weight of the newest perturbation in the moving average.")
    flat_ascent_r: int | None = _key("bilora: rank of the ascent factors.")
    flat_variant: str | None = _key("bar: 'obar' or 'nbar'.")

    def config(self, lora: LoraConfig | None = None) -> PerturbedLoraConfig:
        """The configuration of the method, with the values of `lora` for the fields of LoraConfig."""
        return flat_config(vars(self), lora)


def flat_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that begin with `flat_` and have a value."""
    return {key: value for key, value in values.items() if key.startswith(PREFIX) and value is not None}


def flat_config(values: Mapping[str, Any], lora: LoraConfig | None = None) -> PerturbedLoraConfig:
    """The configuration that the `flat_...` keys among `values` describe.

    Args:
        values: keys and values of a configuration file; others than `flat_...` are ignored, and so is None.
        lora: where the fields of LoraConfig are taken from; default: their defaults.

    Raises:
        ValueError: an unknown method, a key that the method does not have, or a value out of its bounds.
    """
    own = {key.removeprefix(PREFIX): value for key, value in flat_keys(values).items()}
    kind = _method(own.pop("method", "flatlora"))
    known = own_fields(kind)
    unknown = sorted(PREFIX + name for name in own.keys() - known)
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: no setting of {kind.__name__}. It has flat_method and "
            f"{', '.join(sorted(PREFIX + name for name in known))}."
        )
    # given, so that the configuration is not taken for one that lost its strength
    own.setdefault("rho", float(kind.rho))
    inherited = {} if lora is None else {f.name: getattr(lora, f.name) for f in fields(LoraConfig) if f.init}
    return kind(**inherited, **own)


def make_model_flat(model: PeftModel, values: Mapping[str, Any]) -> PerturbedLoraConfig:
    """Make the active adapter of a model flat, in place, after a framework has created or loaded it as plain LoRA.

    Returns:
        the configuration of the adapter. `model.peft_config` still has the framework's.

    Raises:
        ValueError: see `flat_config`; or the model has no LoRA layer, is flat already, or has a layer that cannot be
            perturbed. The model is then as it was.
    """
    adapter = model.active_adapter
    lora: Any = model.peft_config[adapter]
    config = flat_config(values, lora)
    attach_method(model, config.settings(), config.rho, config.on_unsupported, [adapter])
    return config


def prepare_trainer(trainer: Trainer, callback: FlatLoraCallback) -> None:
    """Add the callback to the trainer of a flat model, and the second pass if the method has one.

    The class of the trainer is changed for the second pass, because frameworks choose and create it in many ways.

    Raises:
        TypeError: the method has two passes, and the trainer generates the data of a step in the step.
    """
    callback.add_to(trainer)
    kind, model = type(trainer), trainer.model
    assert isinstance(model, nn.Module)
    two_passes = any(part.settings.method.passes == 2 for part in flat_parts(model))
    if two_passes and not issubclass(kind, TwoPassTrainerMixin):
        trainer.__class__ = type(kind.__name__, (TwoPassTrainerMixin, kind), {"__module__": kind.__module__})


def _method(name: Any) -> type[PerturbedLoraConfig]:
    """The configuration class of a method: FMLoraConfig is fmlora, LoraSamConfig is lora_sam or lorasam."""
    known = {
        name.removesuffix("Config").lower(): kind
        for name, kind in known_classes().items()
        if kind.make_method is not PerturbedLoraConfig.make_method
    }
    found = known.get(str(name).lower().replace("_", "").replace("-", ""))
    if found is None:
        raise ValueError(f"flat_method must be one of {', '.join(sorted(known))}, got {name!r}")
    return found
