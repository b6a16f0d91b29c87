"""The arms of the study: what is trained, and the one number of each that is tuned.

An arm takes the tuned learning rate of its base (LoRA, DoRA, PiSSA or LoRA+; four trials) and then tunes one strength
(four trials). What the strength is, is the arm's `knob`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import MontecloraConfig
from torch import nn
from torch.optim import AdamW, Optimizer

import flatlora

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
RHOS = (0.05, 0.1, 0.2, 0.4)
LORA_PLUS_RATIO = 16.0  # learning rate of B over that of A: the default of LoRA+'s authors (arXiv 2402.12354)
TRAINING = ("weight_decay", "label_smoothing", "patience", "average_from")  # knobs of the loop, not of the model


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name, label: in the CSV; in tables.
        knob: what the strength sets: "lr" for the bases, a field of the configuration, or one of `TRAINING`.
        grid: strengths that are tried, four each.
        base: the arm whose tuned learning rate is taken.
        config, options: the configuration class, and its fields apart from the strength.
        passes: forward and backward passes of a step.
        tuned_as: the arm whose tuned strength is taken; this arm is not tuned.
        share: of the steps that are made, 0.5 for a two-pass method in equal time.
        simple: a simple regularizer, which everybody has at hand.
    """

    name: str
    label: str
    knob: str
    grid: tuple[float, ...]
    base: str = "lora"
    config: type[LoraConfig] = LoraConfig
    options: dict[str, Any] = field(default_factory=dict)
    passes: int = 1
    tuned_as: str | None = None
    share: float = 1.0
    simple: bool = False

    @property
    def is_base(self) -> bool:
        return self.knob == "lr"


FLAT, DORA, PISSA = flatlora.FlatLoraConfig, {"use_dora": True}, {"init_lora_weights": "pissa"}
SAM, FM = flatlora.LoraSamConfig, flatlora.FMLoraConfig
ARMS = [
    Arm("lora", "LoRA", "lr", LEARNING_RATES),
    Arm("weight-decay", "LoRA, weight decay", "weight_decay", (0.1, 1.0, 3.0, 10.0), simple=True),
    Arm("dropout", "LoRA, dropout", "lora_dropout", (0.05, 0.1, 0.2, 0.4), simple=True),
    Arm("smoothing", "LoRA, label smoothing", "label_smoothing", (0.02, 0.05, 0.1, 0.2), simple=True),
    Arm("early-stopping", "LoRA, early stopping", "patience", (1, 2, 3, 8), simple=True),
    Arm("average", "LoRA, average of the factors", "average_from", (0.0, 0.25, 0.5, 0.75), simple=True),
    Arm("flat", "Flat-LoRA", "rho", RHOS, config=FLAT),
    Arm("rwp", "RWP", "rho", RHOS, config=flatlora.RwpConfig),
    Arm("rwp-factors", "RWP in A and B", "rho", RHOS, config=flatlora.RwpConfig, options={"space": "adapter"}),
    Arm("lora-sam", "LoRA-SAM", "rho", (0.02, 0.05, 0.1, 0.2), config=SAM, passes=2),
    Arm("fmlora", "FMLoRA", "rho", RHOS, config=FM, passes=2),
    Arm("bilora", "Bi-LoRA", "rho", RHOS, config=flatlora.BiLoraConfig),
    Arm("nbar", "nBAR", "rho", (0.25, 1.0, 4.0, 16.0), config=flatlora.BarConfig, options={"variant": "nbar"}),
    Arm("dora", "DoRA", "lr", LEARNING_RATES, base="dora", options=DORA),
    Arm("dora-flat", "DoRA + Flat-LoRA", "rho", RHOS, base="dora", config=FLAT, options=DORA),
    Arm("pissa", "PiSSA", "lr", LEARNING_RATES, base="pissa", options=PISSA),
    Arm("pissa-flat", "PiSSA + Flat-LoRA", "rho", RHOS, base="pissa", config=FLAT, options=PISSA),
    Arm("lora-plus", "LoRA+", "lr", (1e-4, 3e-4, 1e-3, 3e-3), base="lora-plus"),
    Arm("lora-plus-flat", "LoRA+ + Flat-LoRA", "rho", RHOS, base="lora-plus", config=FLAT),
    Arm("monteclora", "MonteCLoRA", "sample_scaler", (1e-4, 3e-4, 1e-3, 3e-3)),
    Arm("lora-sam-half", "LoRA-SAM, half the steps", "rho", (), config=SAM, passes=2, tuned_as="lora-sam", share=0.5),
    Arm("fmlora-half", "FMLoRA, half the steps", "rho", (), config=FM, passes=2, tuned_as="fmlora", share=0.5),
    Arm("efmlora", "EFMLoRA", "rho", RHOS, config=flatlora.EFMLoraConfig),  # last: see PLAN.md
]
BY_NAME = {arm.name: arm for arm in ARMS}
CORE = (  # of the cells that do not hold every arm
    *("lora", "weight-decay", "dropout", "smoothing", "early-stopping", "average"),
    *("flat", "rwp", "bilora", "efmlora"),
)


def adapt(base: nn.Module, arm: Arm, strength: float, seed: int, steps: int, options: dict[str, Any]) -> PeftModel:
    """The base model with new adapters, whose initial values the seed sets.

    Args:
        options: of the task, and of an ablation: rank, target modules, schedule and the like.
    """
    options = {**options, **arm.options}
    if arm.knob == "sample_scaler":
        options["monteclora_config"] = MontecloraConfig(sample_scaler=strength)
    elif not arm.is_base and arm.knob not in TRAINING:
        options[arm.knob] = strength
    torch.manual_seed(seed)
    if arm.config is LoraConfig:
        return get_peft_model(base, LoraConfig(**options))
    noise = {"seed": seed} if issubclass(arm.config, (FLAT, flatlora.BiLoraConfig)) else {}
    return flatlora.get_flat_peft_model(base, arm.config(**options, **noise, total_steps=steps))


def optimizer(model: PeftModel, arm: Arm, strength: float, lr: float) -> Optimizer:
    """AdamW, without weight decay unless that is what the arm tunes."""
    decay = strength if arm.knob == "weight_decay" else 0.0
    if arm.base == "lora-plus":
        return create_loraplus_optimizer(
            model, AdamW, lr=lr, loraplus_lr_ratio=LORA_PLUS_RATIO, weight_decay=decay, loraplus_weight_decay=decay
        )
    return AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=decay)


def penalty(model: PeftModel, arm: Arm) -> Callable[[], Any]:
    """What an arm adds to the loss."""
    return model.base_model._get_monteclora_loss if arm.knob == "sample_scaler" else lambda: 0.0
