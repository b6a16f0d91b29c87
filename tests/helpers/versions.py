"""What the oldest supported peft does not have, for tables of cases."""

import peft
import peft.optimizers
import torch
from packaging.version import Version
from peft.tuners.lora import config


def kasa():
    """KaSA came with peft 0.21."""
    return {"kasa": {"kasa_config": config.KasaConfig()}} if hasattr(config, "KasaConfig") else {}


def riemannian():
    """The Riemannian optimizer came with peft 0.21."""
    create = getattr(peft.optimizers, "create_riemannian_optimizer", None)
    return {"riemannian": lambda model: create(model, torch.optim.AdamW, lr=1e-2)} if create else {}


def unmerges(case):
    """With DoRA, peft 0.20 merges a `Conv1D` and cannot unmerge it: its factor has the shape of the transpose."""
    return Version(peft.__version__) > Version("0.20.0") or case.name != "conv1d-gpt2-dora"
