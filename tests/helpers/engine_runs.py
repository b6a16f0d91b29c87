"""Train a few steps with one engine. Each process saves what the tests look at."""

import os
from contextlib import contextmanager, nullcontext
from functools import cache, partial

import pytest
import torch

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
from flatlora.ops import products
from helpers import engine_models, tiny
from helpers.engines import ENGINES, LEARNING_RATE

STEPS, RHO = 4, 0.5
FLAT = {"rho": RHO, "schedule": "linear", "total_steps": STEPS}


def rwp_model(**settings):
    """A model with noise in A and B."""
    return tiny.adapted(RwpConfig(space="adapter", seed=7, **tiny.LORA, **settings))


CHECKPOINTING = {"off": None, "non-reentrant": False, "reentrant": True}
RUNS = {
    "plain": (tiny.plain_model, {}, "off"),
    "zero": (tiny.flat_model, {**FLAT, "rho": 0.0}, "off"),
    **{name: (tiny.flat_model, FLAT, name) for name in CHECKPOINTING},
    "factors": (rwp_model, FLAT, "off"),
    **{kind: (partial(engine_models.make, kind), FLAT, "off") for kind in engine_models.KINDS},
}
REFUSED = {  # the error that is raised, by flatlora or by plain LoRA too
    ("fsdp1", "dora"): "DoRA cannot be trained under FSDP1 .* use_orig_params=False",
    ("fsdp1", "4-bit-dora"): "DoRA cannot be trained under FSDP1",
    ("fsdp1", "experts"): "An expert parameter cannot be trained under FSDP1 .* Use FSDP2",
    ("fsdp1-flat", "experts"): "An expert parameter cannot be trained under FSDP1",
    ("zero3", "4-bit-dora"): "'Params4bit' object has no attribute 'ds_status'",
}


def batch_seed(step, rank):
    return 2 * step + rank


def names_of(engine, four_bit):
    """Names of an engine's runs: those with 4-bit models, or all others."""
    names = [name for name in RUNS if name not in engine_models.KINDS or name in ENGINES[engine].kinds]
    return [name for name in names if ("4-bit" in name) == four_bit]


def record(rank, engine, names, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    found = {}
    for name in names:
        refused = pytest.raises(Exception, match=REFUSED[engine, name]) if (engine, name) in REFUSED else nullcontext()
        with refused:
            found[name] = train(rank, ENGINES[engine], *RUNS[name], follow=name in CHECKPOINTING)
    torch.save(found, f"{folder}/{rank}.pt")


def train(rank, engine, make, settings, checkpointing, follow):
    model = make(**settings)
    if CHECKPOINTING[checkpointing] is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    run, steps = engine(model), []
    shards = run.shards()
    for step in range(STEPS):
        before = run.whole() if follow else None
        with noise() as seen:
            loss = tiny.loss(run.model, seed=batch_seed(step, rank))
            forward = len(seen)
            run.step(loss)
        steps.append({"loss": loss.detach(), "before": before, "forward": seen[:forward], "backward": seen[forward:]})
    return {
        "steps": steps,
        "after": run.whole(),
        "shards": (shards, run.shards()),
        "counted": None if make is tiny.plain_model else perturbation(model).steps,
    }


@contextmanager
def noise():
    """Record key, stream and row strengths of each perturbed weight, in order."""
    seen, perturb = [], products.perturb_weight

    def spy(weight, norms, key, layer, *args, **kwargs):
        made = perturb(weight, norms, key, layer, *args, **kwargs)  # this may write the norms
        row_std = norms * kwargs.get("relative", 1.0)
        seen.append({"key": key.tolist(), "layer": layer, "row_std": row_std, "weight": weight.detach().clone()})
        return made

    products.perturb_weight = spy
    try:
        yield seen
    finally:
        products.perturb_weight = perturb


@cache
def alone(run, ranks=2):
    """Train in one process. Returns the parameters, and for each rank the noise of each step's forward."""
    make, settings, _ = RUNS[run]
    models = [make(**settings) for _ in range(ranks)]
    optimizers = [torch.optim.SGD(tiny.trainable(m), lr=LEARNING_RATE, momentum=0.9) for m in models]
    forwards = [[] for _ in models]

    def loss(model, step, rank):
        with noise() as seen:
            found = tiny.loss(model, seed=batch_seed(step, rank))
        forwards[rank].append(seen)
        return found

    train_together(models, optimizers, loss)
    return dict(models[0].named_parameters()), forwards


def train_together(models, optimizers, loss):
    """Train equal models in one process, one for each rank, and average their gradients. Returns the mean losses."""
    losses = []
    for rank, model in enumerate(models):
        perturbation(model).rank = rank
    for step in range(STEPS):
        found = [loss(model, step, rank) for rank, model in enumerate(models)]
        losses.append(sum(value.item() for value in found) / len(found))
        for value in found:
            value.backward()
        for same in zip(*map(tiny.trainable, models), strict=True):
            mean = torch.stack([p.grad for p in same]).mean(dim=0)
            for p in same:
                p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def step_with_gradients(rank, engines):
    """Each method that uses gradients refuses each of these engines."""
    os.environ["LOCAL_RANK"] = str(rank)
    for engine in engines:
        for kind in (EFMLoraConfig, FMLoraConfig, LoraSamConfig, BiLoraConfig, BarConfig):
            run = ENGINES[engine](tiny.adapted(kind(rho=0.1, **tiny.LORA)))
            with pytest.raises(RuntimeError, match="needs whole factors .*FSDP1 keeps slices.*Use FSDP2"):
                if kind in (FMLoraConfig, LoraSamConfig):
                    with ascent(run.model):
                        tiny.loss(run.model).backward()
                run.step(tiny.loss(run.model))
