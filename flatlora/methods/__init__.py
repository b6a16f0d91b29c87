"""The other flatness methods, through the same door as Flat-LoRA: give their configuration to `get_flat_peft_model`.

| configuration   | file           | perturbs                               | passes | source                     |
|-----------------|----------------|----------------------------------------|--------|----------------------------|
| `FMLoraConfig`  | fmlora.py      | B, by the ascent of the full weight    | 2      | arXiv 2508.00522, alg. 1   |
| `EFMLoraConfig` | fmlora.py      | B, by its moving average               | 1      | arXiv 2508.00522, alg. 2   |
| `LoraSamConfig` | lora_sam.py    | A and B, by their gradients            | 2      | SAM, arXiv 2010.01412      |
| `RwpConfig`     | rwp.py         | the merged weight or A and B, by noise | 1      | RWP, TMLR 2024             |
| `BiLoraConfig`  | bilora.py      | the merged weight, by a second adapter | 1      | arXiv 2508.19564           |
| `BarConfig`     | bar.py         | nothing: A and B are balanced          | 1      | BAR, NeurIPS 2024          |
"""

from .bar import BarConfig
from .bilora import BiLoraConfig
from .fmlora import EFMLoraConfig, FMLoraConfig
from .lora_sam import LoraSamConfig
from .rwp import RwpConfig
from .two_pass import TwoPassTrainerMixin, ascent

__all__ = [
    "BarConfig",
    "BiLoraConfig",
    "EFMLoraConfig",
    "FMLoraConfig",
    "LoraSamConfig",
    "RwpConfig",
    "TwoPassTrainerMixin",
    "ascent",
]
