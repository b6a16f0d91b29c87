"""What version 0.1.0 saved, before the modules moved, loads and continues with the same losses.

For four methods, `saved_by_0.1.0` holds an adapter after three steps of AdamW on helpers/tiny.py, the states of its
perturbation and of the optimizer, and the losses of the next three steps.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny

from flatlora import load, perturbation

SAVED = Path(__file__).parent / "saved_by_0.1.0"
FOLDERS = sorted(SAVED.iterdir())


def test_every_kind_is_there():
    assert {folder.name for folder in FOLDERS} == {"BiLoraConfig", "EFMLoraConfig", "FlatLoraConfig", "RwpConfig"}


# peft 0.20 names the fields of peft 0.21, which wrote the files
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'kasa_config'.:UserWarning")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_continues(folder):
    model = load(tiny.base_model(), str(folder)).train()
    assert type(model.peft_config["default"]).__name__ == folder.name
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    perturbation(model).load_state_dict(torch.load(folder / "state.pt"))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    assert perturbation(model).steps == 3
    losses = []
    for step in range(3, 6):
        loss = tiny.loss(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(json.loads((folder / "losses.json").read_text()), rel=1e-5)
    assert bool(perturbation(model).tensors()) == (folder.name in ("BiLoraConfig", "EFMLoraConfig"))
