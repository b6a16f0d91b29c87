"""All methods as data, and an optimizer step of any of them."""

import pytest

from flatlora import (
    BarConfig,
    BiLoraConfig,
    EFMLoraConfig,
    FMLoraConfig,
    LoraSamConfig,
    RwpConfig,
    ascent,
    perturbation,
)
from flatlora.layers.flat_layer import flat_layers
from helpers import twin

KINDS = [
    (FMLoraConfig, {}),
    (EFMLoraConfig, {}),
    (LoraSamConfig, {}),
    (RwpConfig, {"space": "merged"}),
    (RwpConfig, {"space": "adapter"}),
    (BiLoraConfig, {}),
    (BarConfig, {"variant": "obar"}),
    (BarConfig, {"variant": "nbar"}),
]
NAMES = ["fmlora", "efmlora", "lora-sam", "rwp", "rwp-adapter", "bilora", "obar", "nbar"]
every_method = pytest.mark.parametrize("kind, settings", KINDS, ids=NAMES)


def step(model, optimizer, i, loss=twin.loss):
    if any(flat_layers(model)) and perturbation(model).settings.method.passes == 2:
        with ascent(model):
            loss(model, i).backward()
    value = loss(model, i)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()
