"""Two processes under DDP: EFMLoRA sees averaged gradients, FMLoRA's first pass is each process's own."""

import processes
import pytest
import torch
import twin
from torch.nn.parallel import DistributedDataParallel

from flatlora import EFMLoraConfig, FMLoraConfig, ascent, perturbation

STEPS = 4


def train(rank, kind, folder):
    model = twin.adapted(kind, rho=0.1)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(twin.trainable(model), lr=1e-2)
    offsets = []
    for step in range(STEPS):
        if kind is FMLoraConfig:
            with ascent(ddp):
                twin.loss(ddp, 2 * step + rank).backward()
            offsets.append({name: t.clone() for name, t in perturbation(ddp).tensors().items()})
        twin.loss(ddp, 2 * step + rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    final = {name: p.detach() for name, p in model.named_parameters()}
    torch.save({"model": final, "offsets": offsets, "tensors": perturbation(model).tensors()}, f"{folder}/{rank}.pt")


def alone(kind):
    """The same in one process: gradients of both ranks' batches, averaged by hand."""
    model = twin.adapted(kind, rho=0.1)
    optimizer = torch.optim.AdamW(twin.trainable(model), lr=1e-2)
    for step in range(STEPS):
        for rank in range(2):
            if kind is FMLoraConfig:
                with ascent(model):
                    twin.loss(model, 2 * step + rank).backward()
            (twin.loss(model, 2 * step + rank) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("kind", [EFMLoraConfig, FMLoraConfig])
def test_two_processes(kind, tmp_path):
    processes.run(train, kind, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    expected = alone(kind)
    for name, p in expected.named_parameters():
        torch.testing.assert_close(first["model"][name], p.detach(), rtol=1e-9, atol=1e-12)
    if kind is EFMLoraConfig:
        assert first["tensors"] and all(torch.equal(t, second["tensors"][name]) for name, t in first["tensors"].items())
    else:  # each by its own batch
        pairs = zip(first["offsets"], second["offsets"], strict=True)
        assert all(not torch.equal(a[name], b[name]) for a, b in pairs for name in a)
