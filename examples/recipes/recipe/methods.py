"""The methods by their names on the command line, and a model with adapters of one."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import flatlora

if TYPE_CHECKING:
    from .arguments import RecipeArguments

METHODS: dict[str, type[LoraConfig]] = {
    "lora": LoraConfig,
    "flat": flatlora.FlatLoraConfig,
    "rwp": flatlora.RwpConfig,
    "fmlora": flatlora.FMLoraConfig,
    "efmlora": flatlora.EFMLoraConfig,
    "lora-sam": flatlora.LoraSamConfig,
    "bilora": flatlora.BiLoraConfig,
    "bar": flatlora.BarConfig,
}


def config(method: str, args: RecipeArguments, seed: int, **more: Any) -> LoraConfig:
    """The configuration of a method.

    Args:
        more: further fields of LoraConfig: task_type, modules_to_save and the like.
    """
    names = args.target_modules
    options: dict[str, Any] = {
        "r": args.r,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.lora_dropout,
        "target_modules": names if names == "all-linear" else names.split(","),
        **more,
    }
    if method == "lora":
        return LoraConfig(**options)
    kind = METHODS[method]
    if args.rho is not None:
        options["rho"] = args.rho
    if "seed" in inspect.signature(kind).parameters:
        options["seed"] = seed
    return kind(**options)


def adapt(base: nn.Module, method: str, args: RecipeArguments, seed: int, **more: Any) -> PeftModel:
    """The base model with new adapters, whose initial values the seed sets: the same for every method."""
    torch.manual_seed(seed)
    made = config(method, args, seed, **more)
    return get_peft_model(base, made) if method == "lora" else flatlora.get_flat_peft_model(base, made)
