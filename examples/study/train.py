"""One run: train an arm once, and measure it. Everything but the arm is paired by seed."""

from __future__ import annotations

import itertools
import math
import time
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from study import outcomes
from study.arms import BY_NAME, Arm, adapt, optimizer, penalty
from study.tasks import Cell, Task, Tests
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import get_linear_schedule_with_warmup

import flatlora

LOOKS = 8  # of early stopping, in a run
WARM_UP = 0.1  # share of the steps
ROUNDED = 3  # every third test example is answered with rounded weights


@dataclass(frozen=True)
class Recipe:
    """What one run is."""

    cell: Cell
    arm: str
    strength: float  # the learning rate itself for a base
    lr: float
    seed: int
    options: dict[str, Any] = field(default_factory=dict)  # of the configuration, for ablations
    accumulate: int = 1  # backward passes of a step
    dtype: torch.dtype | None = None  # of the base model; default: the task's
    variant: str = ""  # name of the ablation
    averaged_rho: float | None = None  # strength of the noise over which predictions are averaged

    def key(self, part: str) -> dict[str, Any]:
        """The columns that make a run."""
        named = {"strength": float(self.strength), "lr": float(self.lr), "seed": self.seed}
        return {"part": part, "cell": self.cell.name, "arm": self.arm, "variant": self.variant, **named}


def tune(task: Task, recipe: Recipe) -> dict[str, Any]:
    """The outcomes on validation data. No test is in reach of this function."""
    model, row = train(task, recipe)
    model = outcomes.served(outcomes.merge(model), recipe.dtype or task.dtype)
    return row | named("validation", task.measure(model, task.validation))


def final(task: Task, recipe: Recipe, tests: Tests, eigenvalue: bool = False) -> dict[str, Any]:
    """All outcomes, on the tests."""
    model, row = train(task, recipe)
    drawn = task.draw(recipe.cell, recipe.seed)
    layers, dtype = outcomes.adapted_layers(model), recipe.dtype or task.dtype
    merged = outcomes.merge(model)
    model = outcomes.served(merged, dtype)
    row |= named("train", task.measure(model, drawn))
    for domain, examples in tests.items():
        row |= named(domain, task.measure(model, examples))
    for bits in outcomes.BITS:
        rounded = outcomes.served(merged, dtype, layers, bits)
        for domain in task.domains:
            row[f"{task.scores[0]}{bits}_{domain}"] = task.measure(rounded, tests[domain][::ROUNDED])[task.scores[0]]
    for name in task.forgets:
        untrained = task.base(recipe.seed, dtype).to(task.device).eval()
        row[f"nll_{name}_before"] = task.measure(untrained, tests[name])["nll"]
    probe = task.batch(task.chunks(drawn[: task.probe], task.probe)[0])
    row["sharpness"] = outcomes.sharpness(model, task.loss, probe, layers, task.rho, task.pairs)
    if eigenvalue and task.eigen_steps:
        few = task.batch(task.chunks(drawn[: task.probe // 2], task.probe)[0])
        row["eigenvalue"] = outcomes.top_eigenvalue(merged, task.loss, few, layers, task.eigen_steps)
    return row


def averaged(task: Task, recipe: Recipe, tests: Tests, samples: int) -> dict[str, Any]:
    """The scores of the mean prediction over noise in the merged weight, on the tests."""
    model, row = train(task, recipe)
    if BY_NAME[recipe.arm].config is LoraConfig:
        flatlora.attach(model, rho=recipe.averaged_rho, seed=recipe.seed)
    predict = MeanPrediction(model, samples, recipe.averaged_rho)
    for domain, examples in tests.items():
        row |= named(domain, task.measure(predict, examples))
    return row


class MeanPrediction(nn.Module):
    """A model whose logits are the logarithms of averaged probabilities."""

    def __init__(self, model: PeftModel, samples: int, rho: float | None) -> None:
        super().__init__()
        self.predict = flatlora.averaged(model, samples, rho=rho)

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.predict(**inputs).log())


def columns(task: Task) -> list[str]:
    """The outcomes that a row of this task can have."""
    sets = ["validation", "train", *task.domains]
    measured = [f"{score}_{name}" for name in sets for score in task.scores]
    rounded = [f"{task.scores[0]}{bits}_{domain}" for bits in outcomes.BITS for domain in task.domains]
    forgotten = [column for name in task.forgets for column in (f"nll_{name}", f"nll_{name}_before")]
    return ["train_seconds", "train_loss", "steps", *measured, *rounded, *forgotten, "sharpness", "eigenvalue"]


def named(name: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{score}_{name}": value for score, value in scores.items()}


def train(task: Task, recipe: Recipe) -> tuple[PeftModel, dict[str, Any]]:
    """The trained model, and how the training went."""
    start = time.perf_counter()
    arm, cell = BY_NAME[recipe.arm], recipe.cell
    steps = round(cell.steps * arm.share)
    base = task.base(recipe.seed, recipe.dtype or task.dtype).to(task.device)
    model = adapt(base, arm, recipe.strength, recipe.seed, steps, {**task.adapters, **recipe.options})
    loop = Loop(task, model, arm, recipe, steps)
    losses = [loop.step(batch) for batch in itertools.islice(loop.batches, steps) if not loop.stopped]
    loop.finish()
    last = losses[-10:]
    took = {"train_seconds": round(time.perf_counter() - start, 1), "steps": len(losses)}
    return model.eval(), took | {"train_loss": sum(last) / len(last)}


class Loop:
    """The training loop with what the arms need: a second pass, early stopping, an average of the factors."""

    def __init__(self, task: Task, model: PeftModel, arm: Arm, recipe: Recipe, steps: int) -> None:
        self.task, self.model, self.arm, self.recipe, self.steps = task, model, arm, recipe, steps
        self.batches = task.batches(task.draw(recipe.cell, recipe.seed), recipe.seed)
        self.optimizer = optimizer(model, arm, recipe.strength, recipe.lr)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, round(WARM_UP * steps), steps)
        self.smoothing = recipe.strength if arm.knob == "label_smoothing" else 0.0
        self.penalty = penalty(model, arm)
        self.factors = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        self.average = AveragedModel(self.factors) if arm.knob == "average_from" else None
        self.best: tuple[float, list[Tensor]] | None = None
        self.waited, self.done, self.stopped = 0, 0, False
        torch.manual_seed(recipe.seed)  # dropout: the same masks for every arm
        model.train()

    def step(self, batch: list) -> float:
        """One optimizer step; returns its loss."""
        size = len(batch) // self.recipe.accumulate
        parts = [self.task.batch(batch[k : k + size]) for k in range(0, len(batch), size)]
        if self.arm.passes == 2:
            with flatlora.ascent(self.model):
                for part in parts:
                    (self.task.loss(self.model, part) / len(parts)).backward()
        total = 0.0
        for part in parts:
            loss = (self.task.loss(self.model, part, self.smoothing) + self.penalty()) / len(parts)
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss of step {self.done + 1} is {total}")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.done += 1
        if self.average is not None and self.done > self.recipe.strength * self.steps:
            self.average.update_parameters(self.factors)
        if self.arm.knob == "patience" and self.done % max(1, self.steps // LOOKS) == 0:
            self.look()
        return total

    def look(self) -> None:
        """Keep the factors that are best on validation data, and stop after `patience` looks without a better one."""
        scores = self.task.measure(self.model.eval(), self.task.stopping)
        self.model.train()
        if self.best is None or scores["nll"] < self.best[0]:
            self.best, self.waited = (scores["nll"], deepcopy([p.detach() for p in self.factors])), 0
        else:
            self.waited += 1
            self.stopped = self.waited >= self.recipe.strength

    @torch.no_grad()
    def finish(self) -> None:
        """Put the best or the average factors in place."""
        kept = self.best[1] if self.best else list(self.average.module) if self.average else []
        for parameter, value in zip(self.factors, kept, strict=False):
            parameter.copy_(value)
