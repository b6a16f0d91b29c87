"""Flat-LoRA for peft: LoRA adapters in flat minima of the merged weight."""

from . import _moved  # noqa: F401  (old module names)
from .api import ascent, attach, averaged, detach, get_flat_peft_model, load, perturbation, perturbed, unperturbed
from .integrations.callback import FlatLoraCallback
from .integrations.trainer import TwoPassTrainerMixin
from .methods import (
    BarConfig,
    BiLoraConfig,
    EFMLoraConfig,
    FlatLoraConfig,
    FMLoraConfig,
    LoraSamConfig,
    RwpConfig,
)
from .training.perturbation import Perturbation

__version__ = "0.1.0"

__all__ = [
    "BarConfig",
    "BiLoraConfig",
    "EFMLoraConfig",
    "FMLoraConfig",
    "FlatLoraCallback",
    "FlatLoraConfig",
    "LoraSamConfig",
    "Perturbation",
    "RwpConfig",
    "TwoPassTrainerMixin",
    "ascent",
    "attach",
    "averaged",
    "detach",
    "get_flat_peft_model",
    "load",
    "perturbation",
    "perturbed",
    "unperturbed",
]
