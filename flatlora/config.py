"""LoraConfig and the settings of a perturbation: what all methods share, and Flat-LoRA's."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from .adoption import create_layer
from .method import FlatLora, Method
from .settings import CHECKS, Settings
from .utils import jsonfiles
from .utils.arguments import keywords, path, text

CONFIG_NAME = "flatlora_config.json"
WAY_OUT = (
    "Save the configuration again with its save_pretrained, or delete the file and pass rho= and what else it held"
)
# keywords of the hub that peft passes on; `dry_run` gives no file
HUB_OPTIONS = inspect.signature(hf_hub_download).parameters.keys() - {"repo_id", "filename", "subfolder", "dry_run"}


class Unset(float):
    """The default of a number: equal to it, and known not to have been given."""


class OnlyOurLayers(dict):
    """Metadata of a field of ours: an error where peft would hand our configuration to a layer that is not flat.

    An adapter that is added to layers which a plain LoraConfig made is made by those layers; no code of ours runs, and
    it would train unperturbed without a word. But peft asks each field of the configuration there whether it declares
    a variant of LoRA. Our layers and our factory show peft a plain LoraConfig, so it asks nowhere else.
    """

    def get(self, key: str, default: Any = None) -> Any:
        if key == "is_lora_variant":
            raise ValueError(
                "a flat adapter cannot be added to layers that a plain LoraConfig made: they would train it without "
                "noise. Add it as a LoraConfig and call flatlora.attach(model, adapter_names=[its name], rho=...), or "
                "make the flat adapter first and add the plain one to it."
            )
        return super().get(key, default)


@dataclass
class PerturbedLoraConfig(LoraConfig):
    """
    What the configurations of all methods share: all of [`LoraConfig`], and how strongly training is perturbed when.

    Args:
        rho (`float`):
            Strength of the perturbation; its unit is the method's. 0 is plain LoRA, bit for bit.
        schedule (`Literal["cosine", "linear", "constant", "cosine_decay", "linear_decay", "inverse_sqrt"]`):
            How rho_t follows from rho: growing from 0 to rho over the run ("cosine", "linear"), rho throughout, falling
            from rho to 0 ("cosine_decay", "linear_decay"), or `rho / sqrt(t)` at optimizer step t = 1, 2, ...
        total_steps (`int`, *optional*):
            Length of the run in optimizer steps. `FlatLoraCallback` fills it in; without it rho_t = rho throughout
            ("constant" and "inverse_sqrt" do not need it).
        on_unsupported (`Literal["error", "warn"]`):
            What to do with a targeted layer that cannot be perturbed: refuse, or warn and train it unperturbed.
    """

    rho: float = field(default=Unset(0.05), metadata={"help": "Strength of the perturbation; 0 is LoRA."})
    schedule: Literal["cosine", "linear", "constant", "cosine_decay", "linear_decay", "inverse_sqrt"] = field(
        default="constant", metadata={"help": "How the strength rho_t follows from rho over the run."}
    )
    total_steps: int | None = field(
        default=None, metadata={"help": "Length of the run in optimizer steps; FlatLoraCallback fills it in."}
    )
    on_unsupported: Literal["error", "warn"] = field(
        default="error", metadata=OnlyOurLayers(help="Refuse a targeted layer that cannot be perturbed, or warn.")
    )

    def __post_init__(self) -> None:
        from_dict, without_rho = self.peft_type is not None, isinstance(self.rho, Unset)
        super().__post_init__()
        if from_dict and without_rho:
            raise ValueError(
                f"rho must be given where a {type(self).__name__} is made from the fields of another configuration: "
                "to_dict() and adapter_config.json hold those of LoraConfig alone, and the others would silently be "
                "their defaults. Pass rho= (and schedule=, seed=, ...), or copy a configuration with copy.deepcopy or "
                f"dataclasses.replace, or load it with {type(self).__name__}.from_pretrained."
            )
        self.check()
        self._register_custom_module({nn.Module: create_layer})  # type: ignore[dict-item]  # any callable will do

    def check(self) -> None:
        """Look at our own settings, which can have been changed since they were given; their plain values are kept.

        Raises:
            ValueError, TypeError: one of them is senseless.
        """
        for name, check in own_checks(type(self)).items():
            setattr(self, name, check(name, getattr(self, name)))
        self.make_method()

    def make_method(self) -> Method:
        """The method with its own settings."""
        raise TypeError(f"{type(self).__name__} is no method: use FlatLoraConfig or one of flatlora.methods")

    def settings(self) -> Settings:
        """The settings that all flat adapters of a model share, checked."""
        self.check()
        values = {f.name: getattr(self, f.name) for f in fields(Settings) if hasattr(self, f.name)}
        return Settings(**values, method=self.make_method())

    def to_dict(self) -> dict[str, Any]:
        """The fields of `LoraConfig` alone.

        peft writes them into `adapter_config.json` and diffusers into the metadata of its files, from which it makes a
        `LoraConfig(**metadata)`: every reader of LoRA must know them all. `dataclasses.asdict` gives ours too.
        """
        own = own_fields(type(self))
        return {name: value for name, value in super().to_dict().items() if name not in own}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save `adapter_config.json` as peft does, and our own settings beside it in `flatlora_config.json`.

        Warns of an adapter file without a tensor, which peft has written there before, and of a damaged one.
        """
        path("save_directory", save_directory)
        keywords("save_pretrained", kwargs, {"auto_mapping_dict"})
        self.check()
        super().save_pretrained(save_directory, **kwargs)
        own = {name: value for name, value in asdict(self).items() if name in own_fields(type(self))}
        if type(self) is not FlatLoraConfig:
            own["config_class"] = type(self).__name__
        jsonfiles.write(os.path.join(save_directory, CONFIG_NAME), json.dumps(own, indent=2, sort_keys=True))
        warn_of_no_tensors(os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PerturbedLoraConfig:
        """Load what `save_pretrained` saved, from a folder or the hub; `kwargs` override what is in the files.

        Raises:
            ValueError: the adapter is no LoRA, it was trained with another method, it was saved without our settings
                and `rho` is not given, or a file is damaged.
            TypeError: a keyword that is neither a setting nor an option of the hub.
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
        plain = PeftConfig.from_pretrained(where, subfolder=subfolder, **kwargs)
        if type(plain) is not LoraConfig:
            raise ValueError(f"{where!r} is a {type(plain).__name__}, not a LoRA adapter")
        trained_with = (own or {}).pop("config_class", FlatLoraConfig.__name__ if own is not None else cls.__name__)
        if trained_with != cls.__name__:
            raise ValueError(
                f"{where!r} was trained with {trained_with}, not {cls.__name__}: "
                f"call {trained_with}.from_pretrained, or flatlora.load, which finds it"
            )
        if own is None and "rho" not in override:
            raise ValueError(
                f"{where!r} has no {CONFIG_NAME}: it was not trained with flatlora. Pass rho=, "
                "or load it with PeftModel.from_pretrained(..., is_trainable=True) and call flatlora.attach."
            )
        values = {f.name: getattr(plain, f.name) for f in fields(LoraConfig) if f.init}
        return cls(**{**values, **check_own(cls, own, os.path.join(where, subfolder or "", CONFIG_NAME)), **override})


@dataclass
class FlatLoraConfig(PerturbedLoraConfig):
    """
    Configuration of Flat-LoRA (arXiv 2409.14396): all of [`LoraConfig`], and the noise under which it trains.

    Each training forward runs at `W + s*B*A + eps`, where `eps_ij = rho_t / sqrt(n) * ||W'_i|| * z_ij`: Gaussian noise
    whose standard deviation in row i is `rho_t / sqrt(n)` times the norm of row i of the merged weight, n the number of
    columns.

    Args:
        rho (`float`):
            Strength of the noise, relative to the weight. 0 is plain LoRA, bit for bit. Default 0.05: the paper's
            value for T5 and Llama-2; its ablation (section 4.6) is best between 0.05 and 0.10.
        schedule (`str`):
            How rho_t follows from rho over the run. Default "cosine", the paper's: it grows from 0 to rho.
        total_steps (`int`, *optional*), on_unsupported (`Literal["error", "warn"]`):
            See [`PerturbedLoraConfig`].
        resample (`Literal["forward", "step"]`):
            "forward": new noise at the first training forward after each backward. "step": one noise sample for each
            optimizer step, as in the paper; the same thing without gradient accumulation.
        seed (`int`, *optional*):
            Seed of the noise. Default: torch's initial seed, so that `set_seed` reproduces a run.
        backend (`str`):
            Which implementation makes the noise. "auto" takes the fastest that is there.
    """

    schedule: Literal["cosine", "linear", "constant", "cosine_decay", "linear_decay", "inverse_sqrt"] = field(
        default="cosine", metadata={"help": "How the strength rho_t follows from rho over the run."}
    )
    resample: Literal["forward", "step"] = field(
        default="forward", metadata={"help": "New noise after each backward, or once per optimizer step."}
    )
    seed: int | None = field(default=None, metadata={"help": "Seed of the noise; default: torch's initial seed."})
    backend: str = field(default="auto", metadata={"help": "Implementation of the noise; 'auto' takes the fastest."})

    def make_method(self) -> Method:
        return FlatLora()


def own_fields(kind: type[PerturbedLoraConfig]) -> set[str]:
    """The names that a configuration of ours adds to LoraConfig."""
    return {f.name for f in fields(kind)} - {f.name for f in fields(LoraConfig)}


def settings_of(kind: type[PerturbedLoraConfig]) -> set[str]:
    """The settings that can be given to `from_pretrained`. `inference_mode` follows from `is_trainable`, `revision` is
    the hub's."""
    return {f.name for f in fields(kind) if f.init} - HUB_OPTIONS - {"inference_mode"}


def own_checks(kind: type[PerturbedLoraConfig]) -> dict[str, Any]:
    """The check of each setting that `kind` adds to LoraConfig."""
    found = {f.name: f.metadata.get("check") or CHECKS.get(f.name) for f in fields(kind)}
    return {name: found[name] for name in sorted(own_fields(kind)) if found[name] is not None}


def check_own(kind: type[PerturbedLoraConfig], own: dict[str, Any] | None, file: str) -> dict[str, Any]:
    """What `flatlora_config.json` holds, looked at as a whole.

    Raises:
        ValueError: a setting is missing, unknown or senseless.
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
    """Warn if the saved adapter file has no tensors: loaded, the adapter is a new one. Or if it cannot be read."""
    if os.path.isfile(file):
        try:
            with safe_open(file, "pt") as tensors:
                names = tensors.keys()
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{file} is damaged ({error}): save the model again, or delete it.", stacklevel=3)
            return
        if not names:
            warnings.warn(
                f"{file} holds no tensor: the state dict that it was made from has none of this adapter. Where the "
                "model is sharded (FSDP, ZeRO-3), call accelerator.get_state_dict(model) in all processes and pass "
                "it on: save_pretrained(folder, state_dict=...).",
                stacklevel=4,
            )


def known_classes() -> dict[str, type[PerturbedLoraConfig]]:
    """The configurations of all methods, a user's own too, by the name that a file has."""
    known, todo = {}, [PerturbedLoraConfig]
    while todo:
        kind = todo.pop()
        known[kind.__name__] = kind
        todo += kind.__subclasses__()
    return known


def plain_copy(config: PerturbedLoraConfig) -> LoraConfig:
    """The LoraConfig with the same values."""
    return LoraConfig(**{f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init})


def load_own(path: str, subfolder: str | None = None, **kwargs: Any) -> dict[str, Any] | None:
    """What `flatlora_config.json` holds, in a folder or on the hub; None if there is no such file.

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
    name = own.get("config_class", "FlatLoraConfig")
    if not isinstance(name, str) or name not in known_classes():
        raise ValueError(
            f"{local} cannot be used: config_class must be one of {sorted(known_classes())}, got {name!r}. {WAY_OUT}."
        )
    return own
