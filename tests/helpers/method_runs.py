"""Train with the methods that use gradients under one engine, and in one process with the same global batch."""

import os
from functools import cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora import BarConfig, BiLoraConfig, EFMLoraConfig, FMLoraConfig, LoraSamConfig, ascent, perturbation
from helpers import tiny
from helpers.engines import ENGINES, LEARNING_RATE

STEPS, MICRO_BATCHES, LARGEST_NORM = 10, 2, 0.5
KINDS = {
    "efmlora": (EFMLoraConfig, {}),
    "fmlora": (FMLoraConfig, {}),
    "lora-sam": (LoraSamConfig, {}),
    "obar": (BarConfig, {"variant": "obar"}),
    "nbar": (BarConfig, {"variant": "nbar"}),
    "bilora": (BiLoraConfig, {}),
}


def make(name, lora=tiny.LORA, **more):
    kind, settings = KINDS[name]
    return tiny.adapted(kind(rho=0.3, total_steps=STEPS, **settings, **more, **lora))


def make_narrow(name):
    """A model whose adapter has less elements than one of its weights."""
    more = {"ascent_r": 1} if name == "bilora" else {}
    return make(name, {**tiny.LORA, "r": 1, "target_modules": ["q_proj"]}, **more)


def engine_of(engine, accumulate):
    kind, options = ENGINES[engine], {"micro_batches": MICRO_BATCHES, "largest_norm": LARGEST_NORM}
    return type(kind.__name__, (kind,), options) if accumulate else kind


def losses(model, loss, step):
    """The loss of each micro-batch, after the first pass over it."""
    for place in range(MICRO_BATCHES):
        if perturbation(model).settings.method.passes == 2:
            with ascent(model):
                loss(model, step, place).backward()
        yield loss(model, step, place)


def seed(step, place, rank, ranks):
    return (step * MICRO_BATCHES + place) * ranks + rank


def record(rank, engine, folder):
    """Train with each method. What the tests look at is saved."""
    os.environ["LOCAL_RANK"] = str(rank)
    for name in KINDS:
        found = {kind: train(rank, engine, name, accumulate=kind == "accumulated") for kind in ("plain", "accumulated")}
        found["resumed"] = resume(rank, engine, name, f"{folder}/checkpoint-{name}")
        found["communicated"] = communicate(rank, engine, name)
        torch.save(found, f"{folder}/{name}-{rank}")


def train(rank, engine, name, accumulate=False, first=0, last=STEPS, run=None):
    run = run or engine_of(engine, accumulate)(make(name))

    def loss(model, step, place):
        return tiny.loss(model, seed=seed(step, place, rank, run.processes))

    offsets = []
    for step in range(first, last):
        run.step_over(losses(run.model, loss, step))
        offsets.append({key: t.clone() for key, t in perturbation(run.module).tensors().items()})
    return {"after": run.whole(), "offsets": offsets, "steps": perturbation(run.module).steps}


def resume(rank, engine, name, folder):
    """A run that is saved in its middle, and continued by another model."""
    Path(folder).mkdir(exist_ok=True)
    half = STEPS // 2
    first = ENGINES[engine](make(name))
    train(rank, engine, name, last=half, run=first)
    first.save(folder)
    torch.save(perturbation(first.module).state_dict(), f"{folder}/state-{rank}")
    second = ENGINES[engine](make(name))
    second.load(folder)
    perturbation(second.module).load_state_dict(torch.load(f"{folder}/state-{rank}"))
    return train(rank, engine, name, first=half, run=second)


class Communicated(TorchDispatchMode):
    """The number of elements of each tensor that a collective operation takes or returns."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "c10d" in func.namespace:
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            self.sizes += [t.numel() for t in tensors]
        return out


def communicate(rank, engine, name):
    """Sizes of what is sent by two steps of a method, and of the weights and the adapter of its model."""
    model = make_narrow(name)
    run, seen = ENGINES[engine](model), Communicated()
    for step in range(2):
        if perturbation(model).settings.method.passes == 2:
            first = ascent(run.model)
            first.__enter__()
            tiny.loss(run.model, seed=step).backward()
            with seen:
                first.__exit__(None, None, None)
        loss = tiny.loss(run.model, seed=step)
        run.backward(loss)
        with seen:
            run.update()
    whole = make_narrow(name)
    weights = [p.numel() for key, p in whole.named_parameters() if "q_proj.base_layer.weight" in key]
    return {"sizes": seen.sizes, "weight": min(weights), "adapter": sum(p.numel() for p in tiny.trainable(whole))}


@cache
def alone(name, ranks, accumulate):
    """The same training in one process: parameters, and offsets after each step."""
    model = make(name)
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=LEARNING_RATE, momentum=0.9)
    count = MICRO_BATCHES if accumulate else 1

    def loss(model, step, place):
        return sum(tiny.loss(model, seed=seed(step, place, rank, ranks)) for rank in range(ranks)) / ranks

    offsets = []
    for step in range(STEPS):
        made = losses(model, loss, step)
        for _ in range(count):
            (next(made) / count).backward()
        if accumulate:
            torch.nn.utils.clip_grad_norm_(tiny.trainable(model), LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        offsets.append({key: t.clone() for key, t in perturbation(model).tensors().items()})
    return {"after": {key: p.detach() for key, p in model.named_parameters()}, "offsets": offsets}
