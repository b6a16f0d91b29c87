"""LoraConfig and the settings of a perturbation: what all methods share, and Flat-LoRA's."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

from .adoption import create_layer
from .method import FlatLora, Method
from .settings import BOUNDS, Settings, check_rho

CONFIG_NAME = "flatlora_config.json"
HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "revision", "token"}


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

    rho: float = field(default=0.05, metadata={"help": "Strength of the perturbation; 0 is LoRA."})
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
        super().__post_init__()
        self.rho = check_rho(self.rho)
        settings = self.settings()
        for name in BOUNDS.keys() & own_fields(type(self)):
            setattr(self, name, getattr(settings, name))  # an int, NumPy's as well
        if self.on_unsupported not in ("error", "warn"):
            raise ValueError(f"on_unsupported must be 'error' or 'warn', got {self.on_unsupported!r}")
        self._register_custom_module({nn.Module: create_layer})  # type: ignore[dict-item]  # any callable will do

    def make_method(self) -> Method:
        """The method with its own settings, checked."""
        raise TypeError(f"{type(self).__name__} is no method: use FlatLoraConfig or one of flatlora.methods")

    def settings(self) -> Settings:
        """The settings that all flat adapters of a model share, checked."""
        values = {f.name: getattr(self, f.name) for f in fields(Settings) if hasattr(self, f.name)}
        return Settings(**values, method=self.make_method())

    def to_dict(self) -> dict[str, Any]:
        """The fields of `LoraConfig` alone: `adapter_config.json` stays one that every reader of LoRA knows."""
        own = own_fields(type(self))
        return {name: value for name, value in super().to_dict().items() if name not in own}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save `adapter_config.json` as peft does, and our own settings beside it in `flatlora_config.json`.

        Warns of an adapter file without a tensor, which peft has written there before.
        """
        warn_of_no_tensors(os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME))
        super().save_pretrained(save_directory, **kwargs)
        own = {name: value for name, value in asdict(self).items() if name in own_fields(type(self))}
        if type(self) is not FlatLoraConfig:
            own["config_class"] = type(self).__name__
        with open(os.path.join(save_directory, CONFIG_NAME), "w") as writer:
            writer.write(json.dumps(own, indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PerturbedLoraConfig:
        """Load what `save_pretrained` saved, from a folder or the hub; `kwargs` override what is in the files.

        Raises:
            ValueError: the adapter is no LoRA, it was trained with another method, or it was saved without our
                settings and `rho` is not given.
        """
        ours = own_fields(cls)
        settable = {f.name for f in fields(cls) if f.init} - HUB_OPTIONS
        override = {name: kwargs.pop(name) for name in settable & kwargs.keys()}
        plain = PeftConfig.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if type(plain) is not LoraConfig:
            raise ValueError(f"{pretrained_model_name_or_path!r} is a {type(plain).__name__}, not a LoRA adapter")
        own = load_own(pretrained_model_name_or_path, subfolder, **kwargs)
        trained_with = (own or {}).pop("config_class", FlatLoraConfig.__name__ if own else cls.__name__)
        if trained_with != cls.__name__:
            raise ValueError(
                f"{pretrained_model_name_or_path!r} was trained with {trained_with}, not {cls.__name__}: "
                f"call {trained_with}.from_pretrained, or flatlora.load, which finds it"
            )
        if own is None and "rho" not in override:
            raise ValueError(
                f"{pretrained_model_name_or_path!r} has no {CONFIG_NAME}: it was not trained with flatlora. Pass rho=, "
                "or load it with PeftModel.from_pretrained(..., is_trainable=True) and call flatlora.attach."
            )
        unknown = (own or {}).keys() - ours
        if unknown:
            raise ValueError(
                f"{CONFIG_NAME} of {pretrained_model_name_or_path!r} has settings that {cls.__name__} does not know: "
                f"{sorted(unknown)}. Install the version of flatlora that saved it, or remove them from the file."
            )
        values = {f.name: getattr(plain, f.name) for f in fields(LoraConfig) if f.init}
        return cls(**{**values, **(own or {}), **override})


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


def warn_of_no_tensors(file: str) -> None:
    """Nothing is trained of an adapter whose file is empty: loaded, it is a new one."""
    if os.path.isfile(file):
        with safe_open(file, "pt") as tensors:
            if not tensors.keys():
                warnings.warn(
                    f"{file} holds no tensor: the state dict that it was made from has none of this adapter. Where the "
                    "model is sharded (FSDP, ZeRO-3), call accelerator.get_state_dict(model) in all processes and pass "
                    "it on: save_pretrained(folder, state_dict=...).",
                    stacklevel=4,
                )


def config_class(name: str) -> type[PerturbedLoraConfig]:
    """The configuration class of this name.

    Raises:
        ValueError: there is none.
    """
    known, todo = {}, [PerturbedLoraConfig]
    while todo:
        kind = todo.pop()
        known[kind.__name__] = kind
        todo += kind.__subclasses__()
    if name not in known:
        raise ValueError(f"{name!r} is no configuration of flatlora; known are {sorted(known)}")
    return known[name]


def plain_copy(config: PerturbedLoraConfig) -> LoraConfig:
    """The LoraConfig with the same values."""
    return LoraConfig(**{f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init})


def load_own(path: str, subfolder: str | None = None, **kwargs: Any) -> dict[str, Any] | None:
    """What `flatlora_config.json` holds, in a folder or on the hub; None if there is no such file."""
    local = os.path.join(path, subfolder or "", CONFIG_NAME)
    if not os.path.isdir(path):
        options = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        try:
            local = hf_hub_download(path, CONFIG_NAME, subfolder=subfolder, **options)
        except (EntryNotFoundError, LocalEntryNotFoundError, HFValidationError):  # peft says what is wrong with a path
            return None
    if not os.path.isfile(local):
        return None
    with open(local) as reader:
        return json.load(reader)
