"""Flat-LoRA for peft: LoRA adapters that sit in flat minima of the merged weight."""

from .callback import FlatLoraCallback
from .config import FlatLoraConfig
from .methods import (
    BarConfig,
    BiLoraConfig,
    EFMLoraConfig,
    FMLoraConfig,
    LoraSamConfig,
    RwpConfig,
    TwoPassTrainerMixin,
    ascent,
)
from .model import attach, detach, get_flat_peft_model, load, perturbation, perturbed, unperturbed

__version__ = "0.1.0"

__all__ = [
    "BarConfig",
    "BiLoraConfig",
    "EFMLoraConfig",
    "FMLoraConfig",
    "FlatLoraCallback",
    "FlatLoraConfig",
    "LoraSamConfig",
    "RwpConfig",
    "TwoPassTrainerMixin",
    "ascent",
    "attach",
    "detach",
    "get_flat_peft_model",
    "load",
    "perturbation",
    "perturbed",
    "unperturbed",
]
