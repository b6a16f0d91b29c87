"""What one engine makes of a few steps of training, written down by each process for the tests to look at."""

import os
from contextlib import contextmanager

import tiny
import torch
from spread.engines import ENGINES, LEARNING_RATE

from flatlora import RwpConfig, perturbation
from flatlora.ops import products

STEPS, RHO = 4, 0.5
FLAT = {"rho": RHO, "schedule": "linear", "total_steps": STEPS}


def rwp_model(**settings):
    """Noise in A and B."""
    return tiny.adapted(RwpConfig(space="adapter", seed=7, **tiny.LORA, **settings))


CHECKPOINTING = {"off": None, "non-reentrant": False, "reentrant": True}
RUNS = {
    "plain": (tiny.plain_model, {}, "off"),
    "zero": (tiny.flat_model, {**FLAT, "rho": 0.0}, "off"),
    **{name: (tiny.flat_model, FLAT, name) for name in CHECKPOINTING},
    "factors": (rwp_model, FLAT, "off"),
}


def batch_seed(step, rank):
    return 2 * step + rank


def record(rank, engine, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    found = {name: train(rank, ENGINES[engine], *run) for name, run in RUNS.items()}
    torch.save(found, f"{folder}/{rank}.pt")


def train(rank, engine, make, settings, checkpointing):
    model = make(**settings)
    if CHECKPOINTING[checkpointing] is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    run, steps = engine(model), []
    shards = run.shards()
    for step in range(STEPS):
        before = run.whole()
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
    """Key, stream and row strengths of each perturbed weight that is made inside, in the order of making."""
    seen, perturb = [], products.perturb_weight

    def spy(weight, norms, key, layer, *args, **kwargs):
        made = perturb(weight, norms, key, layer, *args, **kwargs)  # may write the norms
        row_std = norms * kwargs.get("relative", 1.0)
        seen.append({"key": key.tolist(), "layer": layer, "row_std": row_std, "weight": weight.detach().clone()})
        return made

    products.perturb_weight = spy
    try:
        yield seen
    finally:
        products.perturb_weight = perturb


def alone(run):
    """The same training in one process."""
    make, settings, _ = RUNS[run]
    models = [make(**settings) for _ in range(2)]
    optimizers = [torch.optim.SGD(tiny.trainable(m), lr=LEARNING_RATE, momentum=0.9) for m in models]
    train_together(models, optimizers, lambda model, step, rank: tiny.loss(model, seed=batch_seed(step, rank)))
    return dict(models[0].named_parameters())


def train_together(models, optimizers, loss):
    """Equal models in one process, one for each rank, gradients averaged by hand. Returns the mean losses."""
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
