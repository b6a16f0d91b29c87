"""Train with the methods that use gradients under one engine, and in one process with the same global batch."""

import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora import BarConfig, BiLoraConfig, EFMLoraConfig, FMLoraConfig, LoraSamConfig, ascent, perturbation
from flatlora.ops.ascent import full_weight_ascent
from helpers import tiny
from helpers.engines import ENGINES, LEARNING_RATE

STEPS, ACCUMULATED = 10, 3  # optimizer steps of a run, and of one that accumulates gradients
MICRO_BATCHES, LARGEST_NORM = 2, 0.5
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
        plain, resumed = train_and_resume(rank, engine, name, f"{folder}/checkpoint-{name}")
        run = engine_of(engine, accumulate=True)(make(name))
        found = {"plain": plain, "resumed": resumed, "accumulated": train(rank, run, 0, ACCUMULATED)}
        found["communicated"] = communicate(rank, engine, name)
        torch.save(found, f"{folder}/{name}-{rank}")


def train(rank, run, first, last):
    def loss(model, step, place):
        return tiny.loss(model, seed=seed(step, place, rank, run.processes))

    offsets = []
    for step in range(first, last):
        run.step_over(losses(run.model, loss, step))
        offsets.append({key: t.clone() for key, t in perturbation(run.module).tensors().items()})
    return {"after": run.whole(), "offsets": offsets, "steps": perturbation(run.module).steps}


def train_and_resume(rank, engine, name, folder):
    """A run that is saved in its middle, and another model that continues it from there."""
    Path(folder).mkdir(exist_ok=True)
    half = STEPS // 2
    first, second = (ENGINES[engine](make(name)) for _ in range(2))
    begun = train(rank, first, 0, half)
    first.save(folder)
    torch.save(perturbation(first.module).state_dict(), f"{folder}/state-{rank}")
    whole = train(rank, first, half, STEPS)
    second.load(folder)
    perturbation(second.module).load_state_dict(torch.load(f"{folder}/state-{rank}"))
    return {**whole, "offsets": begun["offsets"] + whole["offsets"]}, train(rank, second, half, STEPS)


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


def step_in_half(rank, engine, read):
    """The offset of EFMLoRA comes from float32 values and gradients. `read` returns those of a parameter."""
    os.environ["LOCAL_RANK"] = str(rank)
    model = make("efmlora")
    run = type(engine, (ENGINES[engine],), {"half": True})(model)
    for step in range(2):
        run.backward(tiny.loss(run.model, seed=seed(step, 0, rank, run.processes)))
        expected = {name: offset_of(layer, read) for name, layer in perturbation(model).flat_layers()}
        before, state = perturbation(model).tensors(), perturbation(model)
        scale, beta = state.rho * state.ramp, state.settings.method.beta
        run.update()
        found = perturbation(model).tensors()
        assert len(found) == len(expected) > 0
        for name, make_offset in expected.items():
            key = f"{name}.lora_B.default"
            E = make_offset(before.get(key), scale, beta)
            assert found[key].dtype == torch.float32 and found[key].abs().max() > 0
            torch.testing.assert_close(found[key], E, rtol=1e-4, atol=1e-7)


def offset_of(layer, read):
    (A, grad_A), (B, grad_B) = (read(getattr(layer, factor)["default"].weight) for factor in ("lora_A", "lora_B"))
    assert {t.dtype for t in (A, B, grad_A, grad_B)} == {torch.float32}

    def make_offset(before, rho, beta):
        here = B if before is None else B + before
        E = full_weight_ascent(A, here, grad_A, grad_B, scaling=layer.scaling["default"], rho=rho)
        return E if before is None else torch.lerp(before, E, beta)

    return make_offset


def skip_a_step(rank, engine):
    """A step that DeepSpeed skips changes nothing, and is not counted."""
    os.environ["LOCAL_RANK"] = str(rank)
    for name in ("efmlora", "obar", "bilora"):
        model = make(name)
        run, state = ENGINES[engine](model), perturbation(model)
        run.step(tiny.loss(run.model, seed=rank))
        before = run.whole(), {key: t.clone() for key, t in state.tensors().items()}, state.steps
        run.step(tiny.loss(run.model, seed=rank) * float("inf"))
        after = run.whole(), state.tensors(), state.steps
        assert before[2] == after[2] == 1 and run.model.skipped_steps == 1
        for kept, found in zip(before[:2], after[:2], strict=True):
            assert kept.keys() == found.keys() and all(torch.equal(t, found[key]) for key, t in kept.items())
        run.step(tiny.loss(run.model, seed=rank))
        assert state.steps == 2
        assert not all(torch.equal(t, before[0][key]) for key, t in run.whole().items())


def ascend_without_the_engine(rank, engine):
    """Before the engine has run, the model does not know it."""
    os.environ["LOCAL_RANK"] = str(rank)
    model = make("fmlora")
    ENGINES[engine](model)
    with pytest.raises(RuntimeError, match="trains with DeepSpeed: pass its engine"):
        with ascent(model):
            pass
    assert all(p.requires_grad == ("lora_" in key) for key, p in model.named_parameters())


@cache
def alone(name, ranks, accumulate):
    """The same training in one process: parameters, and offsets after each step."""
    model = make(name)
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=LEARNING_RATE, momentum=0.9)
    count, steps = (MICRO_BATCHES, ACCUMULATED) if accumulate else (1, STEPS)

    def loss(model, step, place):
        return sum(tiny.loss(model, seed=seed(step, place, rank, ranks)) for rank in range(ranks)) / ranks

    offsets = []
    for step in range(steps):
        made = losses(model, loss, step)
        for _ in range(count):
            (next(made) / count).backward()
        if accumulate:
            torch.nn.utils.clip_grad_norm_(tiny.trainable(model), LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        offsets.append({key: t.clone() for key, t in perturbation(model).tensors().items()})
    after = {key: p.detach() for key, p in model.named_parameters()}
    return {"after": after, "offsets": offsets, "steps": steps}
