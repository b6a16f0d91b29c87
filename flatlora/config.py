"""LoraConfig with the settings of a perturbation: fields, checks, saving and loading. Imports no layer."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from .ops import BACKENDS
from .utils import jsonfiles
from .utils.arguments import INT64, SEED, check_fields, checker, choice, integer, keywords, number, path, text

if TYPE_CHECKING:
    from .methods.base import Method

CONFIG_NAME = "flatlora_config.json"
DEFAULT_CLASS = "FlatLoraConfig"  # of a file that does not name its class
WAY_OUT = (
    "Save the configuration again with its save_pretrained, or delete the file and pass rho= and its other settings"
)
# keywords of the hub that peft passes on; `dry_run` returns no file
HUB_OPTIONS = inspect.signature(hf_hub_download).parameters.keys() - {"repo_id", "filename", "subfolder", "dry_run"}

ScheduleName = Literal["cosine", "linear", "constant", "cosine_decay", "linear_decay", "inverse_sqrt"]
NEED_NO_LENGTH = ("constant", "inverse_sqrt")  # schedules that do not depend on the length of the run
LARGEST_RHO = 1e6  # noise a million times the weight: beyond that, products overflow and the loss is NaN


def check_rho(name: str, value: Any) -> float:
    """A strength as a float. It must be a finite number >= 0."""
    number(name, value, low=0, expected="finite and >= 0", hint="; 0 means plain LoRA, 0.05 to 0.10 is usual")
    rho: float = number(
        name, value, high=LARGEST_RHO, expected=f"at most {LARGEST_RHO:g}", hint="; 0.05 to 0.10 is usual"
    )
    return rho


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "rho": check_rho,
    "schedule": checker(choice, get_args(ScheduleName)),
    "total_steps": checker(integer, 1, INT64, optional=True),
    "resample": checker(choice, ("forward", "step")),
    "seed": checker(integer, *SEED, optional=True),
    "backend": checker(choice, ("auto", *BACKENDS)),
    "on_unsupported": checker(choice, ("error", "warn"), "'error' or 'warn'"),
}


def _setting(name: str, default: Any) -> Any:
    """A dataclass field with the check of this setting."""
    return field(default=default, metadata={"check": CHECKS[name]})


@dataclass(frozen=True)
class Settings:
    """The method, and the settings that all flat adapters of a model share, checked at construction."""

    method: Method
    schedule: str = _setting("schedule", "cosine")
    total_steps: int | None = _setting("total_steps", None)
    resample: str = _setting("resample", "forward")
    seed: int | None = _setting("seed", None)
    backend: str = _setting("backend", "auto")

    def __post_init__(self) -> None:
        check_fields(self)


def create_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module:
    """The factory that a configuration registers with peft: the LoRA layer for `target`, made flat."""
    from .layers.peft_door import create_flat_layer

    return create_flat_layer(target, adapter_name, config, **kwargs)


class Unset(float):
    """The default of a number: equal to it, and known not to have been passed."""


class OnlyFlatLayers(dict[str, Any]):
    """Metadata of a field of ours. It raises an error if peft gives our configuration to a layer that is not flat.

    An adapter that is added to layers from a plain LoraConfig is created by those layers. No code of ours runs, and the
    adapter would silently train without noise. But peft asks there whether a field of the configuration declares a
    variant of LoRA. Our layers and our factory give peft a plain LoraConfig, so it asks nowhere else.
    """

    def get(self, key: str, default: Any = None) -> Any:
        if key == "is_lora_variant":
            raise ValueError(
                "a flat adapter cannot be added to layers of a plain LoraConfig: they would train it without noise. "
                "Add it as a LoraConfig and call flatlora.attach(model, adapter_names=[its name], rho=...), or create "
                "the flat adapter first and add the plain one to it."
            )
        return super().get(key, default)


def schedule_field(default: ScheduleName) -> Any:
    """The field `schedule` of a configuration."""
    return field(default=default, metadata={"help": "How the strength rho_t follows from rho over the run."})


@dataclass
class PerturbedLoraConfig(LoraConfig):
    """Base class of the configurations: [`LoraConfig`], and the strength of the perturbation over the run.

    Args:
        rho (`float`):
            Strength of the perturbation, in the unit of the method. 0 is plain LoRA, bit for bit.
        schedule (`Literal["cosine", "linear", "constant", "cosine_decay", "linear_decay", "inverse_sqrt"]`):
            How rho_t follows from rho: growing from 0 to rho over the run ("cosine", "linear"), rho throughout, falling
            from rho to 0 ("cosine_decay", "linear_decay"), or `rho / sqrt(t)` at optimizer step t = 1, 2, ...
        total_steps (`int`, *optional*):
            Length of the run in optimizer steps. `FlatLoraCallback` sets it; without it rho_t = rho throughout
            ("constant" and "inverse_sqrt" do not need it).
        on_unsupported (`Literal["error", "warn"]`):
            What to do with a targeted layer that cannot be perturbed: raise an error, or warn and train it without
            noise.
    """

    rho: float = field(default=Unset(0.05), metadata={"help": "Strength of the perturbation; 0 is LoRA."})
    schedule: ScheduleName = schedule_field("constant")
    total_steps: int | None = field(
        default=None, metadata={"help": "Length of the run in optimizer steps; FlatLoraCallback sets it."}
    )
    on_unsupported: Literal["error", "warn"] = field(
        default="error", metadata=OnlyFlatLayers(help="Error or warning for a targeted layer that cannot be perturbed.")
    )

    def __post_init__(self) -> None:
        from_dict, without_rho = self.peft_type is not None, isinstance(self.rho, Unset)
        super().__post_init__()  # type: ignore[no-untyped-call]  # peft's
        if from_dict and without_rho:
            raise ValueError(
                f"rho must be given when a {type(self).__name__} is created from the fields of another configuration: "
                "to_dict() and adapter_config.json hold the fields of LoraConfig only, and the others would silently "
                "have their defaults. Pass rho= (and schedule=, seed=, ...), or copy a configuration with "
                f"copy.deepcopy or dataclasses.replace, or load it with {type(self).__name__}.from_pretrained."
            )
        self.check()
        self._register_custom_module({nn.Module: create_layer})  # type: ignore[dict-item]  # any callable will do

    def check(self) -> None:
        """Check our own settings, which may have been changed since construction, and store their plain values.

        Raises:
            ValueError, TypeError: one of them is out of its bounds.
        """
        for name, check in own_checks(type(self)).items():
            setattr(self, name, check(name, getattr(self, name)))
        self.make_method()

    def make_method(self) -> Method:
        """The method with its own settings."""
        raise TypeError(f"{type(self).__name__} is not a method: use FlatLoraConfig or one of flatlora.methods")

    def settings(self) -> Settings:
        """The settings that all flat adapters of a model share, checked."""
        self.check()
        values = {f.name: getattr(self, f.name) for f in fields(Settings) if hasattr(self, f.name)}
        return Settings(method=self.make_method(), **values)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `LoraConfig` only.

        peft writes them into `adapter_config.json`, and diffusers into the metadata of its files, from which it creates
        a `LoraConfig(**metadata)`. Readers of LoRA files must know all of them. `dataclasses.asdict` includes ours.
        """
        whole: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]  # peft's
        own = own_fields(type(self))
        return {name: value for name, value in whole.items() if name not in own}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save `adapter_config.json` as peft does, and our own settings beside it in `flatlora_config.json`.

        Warns if the adapter file that peft has written there has no tensors, or is damaged.
        """
        path("save_directory", save_directory)
        keywords("save_pretrained", kwargs, {"auto_mapping_dict"})
        self.check()
        super().save_pretrained(save_directory, **kwargs)
        self.save_own(save_directory)
        warn_of_no_tensors(os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME))

    def save_own(self, save_directory: str) -> None:
        """Save our own settings in `flatlora_config.json`."""
        own = {name: value for name, value in asdict(self).items() if name in own_fields(type(self))}
        if type(self).__name__ != DEFAULT_CLASS:
            own["config_class"] = type(self).__name__
        jsonfiles.write(os.path.join(save_directory, CONFIG_NAME), json.dumps(own, indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PerturbedLoraConfig:
        """Load what `save_pretrained` saved, from a folder or the hub; `kwargs` override what is in the files.

        Raises:
            ValueError: the adapter is not LoRA, it was trained with another method, it was saved without our settings
                and `rho` is not given, or a file is damaged.
            TypeError: a keyword is neither a setting nor an option of the hub.
        """
        where = path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        text("subfolder", subfolder, optional=True)
        settable = settings_of(cls)
        keywords(f"{cls.__name__}.from_pretrained", kwargs, settable | HUB_OPTIONS)
        override = {name: kwargs.pop(name) for name in settable & kwargs.keys()}
        own = load_own(where, subfolder, **kwargs)
        local = Path(where, subfolder or "", PEFT_CONFIG_NAME)
        if local.exists():
            jsonfiles.read(local, "Save the adapter again, or take the file from a backup", strict=False)
        peft_config = PeftConfig.from_pretrained(where, subfolder=subfolder, **kwargs)
        if type(peft_config) is not LoraConfig:
            raise ValueError(f"{where!r} is a {type(peft_config).__name__}, not a LoRA adapter")
        trained_with = (own or {}).pop("config_class", DEFAULT_CLASS if own is not None else cls.__name__)
        if trained_with != cls.__name__:
            raise ValueError(
                f"{where!r} was trained with {trained_with}, not {cls.__name__}: "
                f"call {trained_with}.from_pretrained, or flatlora.load, which finds it"
            )
        if own is None and "rho" not in override:
            raise ValueError(
                f"{where!r} has no {CONFIG_NAME}: it was saved without settings of flatlora (attach saves none). Pass "
                "rho=, or load it with PeftModel.from_pretrained(..., is_trainable=True) and call flatlora.attach."
            )
        values = {f.name: getattr(peft_config, f.name) for f in fields(LoraConfig) if f.init}
        return cls(**{**values, **check_own(cls, own, os.path.join(where, subfolder or "", CONFIG_NAME)), **override})


def own_fields(kind: type[PerturbedLoraConfig]) -> set[str]:
    """The names that a configuration of ours adds to LoraConfig."""
    return {f.name for f in fields(kind)} - {f.name for f in fields(LoraConfig)}


def settings_of(kind: type[PerturbedLoraConfig]) -> set[str]:
    """The settings that `from_pretrained` takes."""
    # `inference_mode` follows from `is_trainable`, and `revision` is an option of the hub
    return {f.name for f in fields(kind) if f.init} - HUB_OPTIONS - {"inference_mode"}


def own_checks(kind: type[PerturbedLoraConfig]) -> dict[str, Any]:
    """The check of each setting that `kind` adds to LoraConfig."""
    found = {f.name: f.metadata.get("check") or CHECKS.get(f.name) for f in fields(kind)}
    return {name: found[name] for name in sorted(own_fields(kind)) if found[name] is not None}


def check_own(kind: type[PerturbedLoraConfig], own: dict[str, Any] | None, file: str) -> dict[str, Any]:
    """Check the content of `flatlora_config.json` as a whole.

    Raises:
        ValueError: a setting is missing, unknown or out of its bounds.
    """
    if own is None:
        return {}
    unknown, missing = own.keys() - own_fields(kind), own_fields(kind) - own.keys()
    if unknown:
        raise ValueError(
            f"{file} has settings that {kind.__name__} does not know: "
            f"{sorted(unknown)}. Install the version of flatlora that saved it, or remove them from the file."
        )
    if missing:
        raise ValueError(f"{file} lacks {', '.join(sorted(missing))}. {WAY_OUT}.")
    for name, check in own_checks(kind).items():
        try:
            own[name] = check(name, own[name])
        except ValueError as error:
            raise ValueError(f"{file} cannot be used: {error}. {WAY_OUT}.") from None
    return own


def warn_of_no_tensors(file: str) -> None:
    """Warn if the saved adapter file has no tensors, so that loading it gives a new adapter, or cannot be read."""
    if os.path.isfile(file):
        try:
            with safe_open(file, "pt") as tensors:
                names = tensors.keys()
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{file} is damaged ({error}): save the model again, or delete it.", stacklevel=3)
            return
        if not names:
            warnings.warn(
                f"{file} holds no tensor: the state dict that was saved has none of this adapter. If the model is "
                "sharded (FSDP, ZeRO-3), call accelerator.get_state_dict(model) in all processes and pass the result "
                "to save_pretrained(folder, state_dict=...).",
                stacklevel=4,
            )


def known_classes() -> dict[str, type[PerturbedLoraConfig]]:
    """The configurations of all methods, also a user's own, by the name in a file."""
    known: dict[str, type[PerturbedLoraConfig]] = {}
    todo: list[type[PerturbedLoraConfig]] = [PerturbedLoraConfig]
    while todo:
        kind = todo.pop()
        known[kind.__name__] = kind
        todo += kind.__subclasses__()
    return known


def lora_config_of(config: PerturbedLoraConfig) -> LoraConfig:
    """The LoraConfig with the same values."""
    return LoraConfig(**{f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init})


def load_own(path: str, subfolder: str | None = None, **kwargs: Any) -> dict[str, Any] | None:
    """The content of `flatlora_config.json` in a folder or on the hub; None if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    local = os.path.join(path, subfolder or "", CONFIG_NAME)
    if not os.path.isdir(path):
        options = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        try:
            local = hf_hub_download(path, CONFIG_NAME, subfolder=subfolder, **options)
        except (EntryNotFoundError, LocalEntryNotFoundError, HFValidationError):  # peft says what is wrong with a path
            return None
    if not os.path.exists(local):
        return None
    own = jsonfiles.read(local, WAY_OUT)
    name = own.get("config_class", DEFAULT_CLASS)
    if not isinstance(name, str) or name not in known_classes():
        raise ValueError(
            f"{local} cannot be used: config_class must be one of {sorted(known_classes())}, got {name!r}. {WAY_OUT}."
        )
    return own


def __getattr__(name: str) -> Any:
    """`FlatLoraConfig` is importable from here too. It is defined with its method."""
    if name == DEFAULT_CLASS:
        from .methods.flat_lora import FlatLoraConfig

        return FlatLoraConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
