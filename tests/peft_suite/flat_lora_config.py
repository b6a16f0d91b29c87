"""A pytest plugin: in the tests that are collected after it, `peft.LoraConfig` is a FlatLoraConfig.

The class keeps its name, so that test ids stay comparable and `-k` expressions on them still hold. The strength is in
the environment, FLATLORA_RHO.
"""

import os
from dataclasses import dataclass

import peft

from flatlora import FlatLoraConfig


@dataclass
class LoraConfig(FlatLoraConfig):
    """FlatLoraConfig with the strength of this run as its default."""

    rho: float = float(os.environ["FLATLORA_RHO"])
    schedule: str = "constant"


peft.LoraConfig = LoraConfig
peft.tuners.LoraConfig = LoraConfig
