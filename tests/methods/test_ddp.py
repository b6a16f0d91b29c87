"""DDP in two processes: a step uses averaged gradients, and the first of two passes is each process's own."""

import pytest
import torch
from helpers import processes, twin
from torch.nn.parallel import DistributedDataParallel

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

pytestmark = [processes.patient, pytest.mark.slow]
STEPS = 4
KINDS = {kind.__name__: kind for kind in (EFMLoraConfig, FMLoraConfig, LoraSamConfig, BarConfig, BiLoraConfig)}
SETTINGS = {"rho": 0.1, "schedule": "constant"}


def passes(model, step, rank, share=1):
    if perturbation(model).settings.method.passes == 2:
        with ascent(model):
            twin.loss(model, 2 * step + rank).backward()
    moved = {name: t.clone() for name, t in perturbation(model).tensors().items()}
    (twin.loss(model, 2 * step + rank) / share).backward()
    return moved


def train(rank, folder):
    for name, kind in {**KINDS, "RwpConfig": RwpConfig}.items():
        model = twin.adapted(kind, **SETTINGS)
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(twin.trainable(model), lr=1e-2)
        moved = []
        for step in range(STEPS):
            moved.append(passes(ddp, step, rank))
            optimizer.step()
            optimizer.zero_grad()
        final = [p.detach() for p in twin.trainable(model)]
        torch.save(
            {"adapter": final, "moved": moved, "tensors": perturbation(model).tensors()}, f"{folder}/{name}{rank}"
        )


def alone(kind):
    """The same in one process: gradients of both ranks' batches, averaged by hand."""
    model = twin.adapted(kind, **SETTINGS)
    optimizer = torch.optim.AdamW(twin.trainable(model), lr=1e-2)
    for step in range(STEPS):
        for rank in range(2):
            passes(model, step, rank, share=2)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in twin.trainable(model)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """name -> the results of the two processes."""
    folder = tmp_path_factory.mktemp("ddp")
    processes.run(train, str(folder))
    return {name: [torch.load(folder / f"{name}{rank}") for rank in range(2)] for name in [*KINDS, "RwpConfig"]}


def test_every_process_ends_with_the_same_adapter(ranks):
    for name, (first, second) in ranks.items():
        assert all(torch.equal(p, q) for p, q in zip(first["adapter"], second["adapter"], strict=True)), name


@pytest.mark.parametrize("name", [name for name in KINDS if name != "BiLoraConfig"])
def test_it_is_one_process_with_both_batches(ranks, name):
    for p, expected in zip(ranks[name][0]["adapter"], alone(KINDS[name]), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-12)


def test_the_average_of_efmlora_is_made_from_averaged_gradients(ranks):
    first, second = (rank["tensors"] for rank in ranks["EFMLoraConfig"])
    assert first and all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("name", ["FMLoraConfig", "LoraSamConfig", "BiLoraConfig"])
def test_each_process_climbs_on_its_own_batch(ranks, name):
    for a, b in zip(*(rank["moved"][1:] for rank in ranks[name]), strict=True):
        assert a and all(not torch.equal(a[key], b[key]) for key in a)
