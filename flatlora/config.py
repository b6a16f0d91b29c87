"""FlatLoraConfig: LoraConfig and the settings of the noise."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig
from torch import nn

from .layer import create_layer
from .state import Settings, check_rho

CONFIG_NAME = "flatlora_config.json"
HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "revision", "token"}


@dataclass
class FlatLoraConfig(LoraConfig):
    """
    Configuration of Flat-LoRA (arXiv 2409.14396): all of [`LoraConfig`], and the noise under which it trains.

    Each training forward runs at `W + s*B*A + eps`, where `eps_ij = rho_t / sqrt(n) * ||W'_i|| * z_ij`: Gaussian noise
    whose standard deviation in row i is `rho_t / sqrt(n)` times the norm of row i of the merged weight, n the number of
    columns.

    Args:
        rho (`float`):
            Strength of the noise, relative to the weight. 0 is plain LoRA, bit for bit. Default 0.05: the paper's
            value for T5 and Llama-2; its ablation (section 4.6) is best between 0.05 and 0.10.
        schedule (`Literal["cosine", "linear", "constant"]`):
            How rho_t grows from 0 to rho over the run (constant: rho throughout). Default "cosine", the paper's.
        total_steps (`int`, *optional*):
            Length of the run in optimizer steps. `FlatLoraCallback` fills it in; without it rho_t = rho throughout.
        resample (`Literal["forward", "step"]`):
            "forward": new noise at the first training forward after each backward. "step": one noise sample for each
            optimizer step, as in the paper; the same thing without gradient accumulation.
        seed (`int`, *optional*):
            Seed of the noise. Default: torch's initial seed, so that `set_seed` reproduces a run.
        backend (`str`):
            Which implementation makes the noise. "auto" takes the fastest that is there.
        on_unsupported (`Literal["error", "warn"]`):
            What to do with a targeted layer that cannot be perturbed: refuse, or warn and train it without noise.
    """

    # peft refuses to add an adapter with an unknown variant to an existing plain LoRA layer. That is what is wanted:
    # no factory of ours runs there, and the adapter would silently train without noise
    rho: float = field(
        default=0.05,
        metadata={"help": "Strength of the noise relative to each row's norm; 0 is LoRA.", "is_lora_variant": True},
    )
    schedule: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata={"help": "How the strength grows from 0 to rho over the run."}
    )
    total_steps: int | None = field(
        default=None, metadata={"help": "Length of the run in optimizer steps; FlatLoraCallback fills it in."}
    )
    resample: Literal["forward", "step"] = field(
        default="forward", metadata={"help": "New noise after each backward, or once per optimizer step."}
    )
    seed: int | None = field(default=None, metadata={"help": "Seed of the noise; default: torch's initial seed."})
    backend: str = field(default="auto", metadata={"help": "Implementation of the noise; 'auto' takes the fastest."})
    on_unsupported: Literal["error", "warn"] = field(
        default="error", metadata={"help": "Refuse a targeted layer that cannot be perturbed, or warn."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rho = check_rho(self.rho)
        self.settings()
        if self.on_unsupported not in ("error", "warn"):
            raise ValueError(f"on_unsupported must be 'error' or 'warn', got {self.on_unsupported!r}")
        self._register_custom_module({nn.Module: create_layer})  # type: ignore[dict-item]  # any callable will do

    def settings(self) -> Settings:
        """The settings that all flat adapters of a model share, checked."""
        return Settings(**{f.name: getattr(self, f.name) for f in fields(Settings)})

    def to_dict(self) -> dict[str, Any]:
        """The fields of `LoraConfig` alone: `adapter_config.json` stays one that every reader of LoRA knows."""
        own = own_fields()
        return {name: value for name, value in super().to_dict().items() if name not in own}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save `adapter_config.json` as peft does, and the noise settings beside it in `flatlora_config.json`."""
        super().save_pretrained(save_directory, **kwargs)
        own = {name: value for name, value in asdict(self).items() if name in own_fields()}
        with open(os.path.join(save_directory, CONFIG_NAME), "w") as writer:
            writer.write(json.dumps(own, indent=2, sort_keys=True))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> FlatLoraConfig:
        """Load what `save_pretrained` saved, from a folder or the hub; `kwargs` override what is in the files.

        Raises:
            ValueError: the adapter is no LoRA, or it was saved without noise settings and `rho` is not given.
        """
        override = {name: kwargs.pop(name) for name in own_fields() & kwargs.keys()}
        plain = PeftConfig.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if type(plain) is not LoraConfig:
            raise ValueError(f"{pretrained_model_name_or_path!r} is a {type(plain).__name__}, not a LoRA adapter")
        own = _load_own(pretrained_model_name_or_path, subfolder, kwargs)
        if own is None and "rho" not in override:
            raise ValueError(
                f"{pretrained_model_name_or_path!r} has no {CONFIG_NAME}: it was not trained with flatlora. Pass rho=, "
                "or load it with PeftModel.from_pretrained(..., is_trainable=True) and call flatlora.attach."
            )
        values = {f.name: getattr(plain, f.name) for f in fields(LoraConfig) if f.init}
        return cls(**values, **{**(own or {}), **override})


def own_fields() -> set[str]:
    """The names that FlatLoraConfig adds to LoraConfig."""
    return {f.name for f in fields(FlatLoraConfig)} - {f.name for f in fields(LoraConfig)}


def plain_copy(config: FlatLoraConfig) -> LoraConfig:
    """The LoraConfig with the same values."""
    return LoraConfig(**{f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init})


def _load_own(path: str, subfolder: str | None, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    local = os.path.join(path, subfolder or "", CONFIG_NAME)
    if not os.path.isdir(path):
        options = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        try:
            local = hf_hub_download(path, CONFIG_NAME, subfolder=subfolder, **options)
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None
    if not os.path.isfile(local):
        return None
    with open(local) as reader:
        return json.load(reader)
