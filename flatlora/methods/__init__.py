"""The methods, one file each. Pass a configuration to `get_flat_peft_model`.

| configuration    | file         | perturbs                                     | passes | source                   |
| ---------------- | ------------ | -------------------------------------------- | ------ | ------------------------ |
| `FlatLoraConfig` | flat_lora.py | the merged weight, relative to its row norms | 1      | Flat-LoRA, ICML 2025     |
| `RwpConfig`      | rwp.py       | the merged weight, or A and B                | 1      | RWP, TMLR 2024           |
| `FMLoraConfig`   | fmlora.py    | B, by the ascent of the full weight          | 2      | arXiv 2508.00522, alg. 1 |
| `EFMLoraConfig`  | fmlora.py    | B, by the moving average of that ascent      | 1      | arXiv 2508.00522, alg. 2 |
| `LoraSamConfig`  | lora_sam.py  | A and B, by their gradients                  | 2      | SAM, arXiv 2010.01412    |
| `BiLoraConfig`   | bilora.py    | the merged weight, by a second adapter       | 1      | arXiv 2508.19564         |
| `BarConfig`      | bar.py       | nothing; it balances A and B                 | 1      | BAR, NeurIPS 2024        |
"""

from typing import Any

from .bar import BarConfig
from .base import FactorOffset, Method, WeightNoise
from .bilora import BiLoraConfig
from .flat_lora import FlatLoraConfig
from .fmlora import EFMLoraConfig, FMLoraConfig
from .lora_sam import LoraSamConfig
from .rwp import RwpConfig

__all__ = [
    "BarConfig",
    "BiLoraConfig",
    "EFMLoraConfig",
    "FMLoraConfig",
    "FactorOffset",
    "FlatLoraConfig",
    "LoraSamConfig",
    "Method",
    "RwpConfig",
    "WeightNoise",
]


def __getattr__(name: str) -> Any:
    """`ascent` and `TwoPassTrainerMixin` are importable from here too. They are defined above this package."""
    if name in ("ascent", "TwoPassTrainerMixin"):
        import flatlora

        return getattr(flatlora, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
