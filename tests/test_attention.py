"""torch's MultiheadAttention: eps in the in_proj and out_proj that peft merges for each call."""

import copy
import io

import peft
import pytest
import torch
import torch.nn.functional as F
from dense import noise
from test_memory import saved_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatlora import (
    BiLoraConfig,
    EFMLoraConfig,
    FlatLoraConfig,
    LoraSamConfig,
    ascent,
    attach,
    detach,
    get_flat_peft_model,
    perturbation,
    perturbed,
    unperturbed,
)
