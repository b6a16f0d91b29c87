"""Which runs there are, in which order, and what tuning chose: the plan of PLAN.md as code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from study.arms import BY_NAME, Arm
from study.tasks import Cell, Task
from study.train import Recipe

TUNING_SEEDS = (100, 101)
ABLATION_CELL, ABLATION_SEEDS = "128-clean", 5
ABLATED_RHOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
ABLATION_REFERENCE = "r=8"  # its LoRA is compared with the ablations that have none of their own
ABLATION_PAIRS = [  # what is compared, then (variant, arm, rho) of one and of the other; rho None: plain LoRA
    *(
        (f"{schedule} minus cosine schedule, rho {rho}", (f"schedule={schedule}", "flat", rho), ("rho", "flat", rho))
        for schedule in ("constant", "linear")
        for rho in (0.1, 0.2)
    ),
    *(
        (f"{noise} minus row-wise noise, rho {rho}", ("rho", arm, rho), ("rho", "flat", rho))
        for noise, arm in (("uniform", "rwp"), ("adapter-space", "rwp-factors"))
        for rho in (0.1, 0.2)
    ),
    (
        "a sample for each step minus for each forward",
        ("resample=step", "flat", 0.2),
        ("resample=forward", "flat", 0.2),
    ),
    ("float32 minus bf16 base, LoRA", ("float32", "lora", None), (ABLATION_REFERENCE, "lora", None)),
    ("float32 minus bf16 base, Flat-LoRA", ("float32", "flat", 0.2), (ABLATION_REFERENCE, "flat", 0.2)),
]
EIGEN_ARMS, EIGEN_SEEDS = ("lora", "flat", "rwp", "rwp-factors"), 3
AVERAGED_CELLS, AVERAGED_ARMS, AVERAGED_SAMPLES = ("128-clean", "128-flipped"), ("lora", "flat"), 8
PARTS = ("tuning", "final", "ablation", "averaged")

Rows = list[dict[str, str]]
Read = Callable[[], Rows]


def runs(part: str, task: Task, cells: list[str], skip: list[str], read: Read) -> Iterator[Recipe]:
    """The runs of a part; `read` gives the rows so far, of which later runs depend on earlier ones.

    Args:
        skip: arms that are left for later.
    """
    make = {"tuning": tuning, "final": final, "ablation": ablation, "averaged": averaged}[part]
    for cell in task.cells:
        if cell.name in cells:
            for recipe in make(cell, read):
                if recipe.arm not in skip:
                    yield recipe


# --- tuning


def tuning(cell: Cell, read: Read) -> Iterator[Recipe]:
    """The learning rates of the bases, then the strengths of the others at the learning rate of their base."""
    arms = [BY_NAME[name] for name in cell.arms]
    for arm in arms:
        if arm.is_base:
            yield from (Recipe(cell, arm.name, lr, lr, seed) for lr in arm.grid for seed in TUNING_SEEDS)
    for arm in arms:
        lr = None if arm.is_base or arm.tuned_as else chosen(cell, BY_NAME[arm.base], read())
        if lr is not None:
            yield from (Recipe(cell, arm.name, strength, lr, seed) for strength in arm.grid for seed in TUNING_SEEDS)


def trials(cell: Cell, arm: Arm, rows: Rows) -> dict[float, list[dict[str, str]]]:
    """Strength -> its rows, one per seed."""
    found = [row for row in rows if (row["part"], row["cell"], row["arm"]) == ("tuning", cell.name, arm.name)]
    return {s: [row for row in found if float(row["strength"]) == s] for s in arm.grid}


def validated(trial: list[dict[str, str]], score: str) -> float:
    """Mean of a validation score over the seeds; NaN if a run failed."""
    return sum(float(row[f"{score}_validation"] or "nan") for row in trial) / len(trial)


def chosen(cell: Cell, arm: Arm, rows: Rows) -> float | None:
    """The strength of highest validation accuracy, ties by the lower NLL.

    None while trials are missing, and where every trial failed: the arm has no final runs.
    """
    if arm.tuned_as:
        return chosen(cell, BY_NAME[arm.tuned_as], rows)
    found = trials(cell, arm, rows)
    if any(len(trial) < len(TUNING_SEEDS) for trial in found.values()):
        return None
    ok = {s: trial for s, trial in found.items() if math.isfinite(validated(trial, "acc"))}
    return max(ok, key=lambda s: (validated(ok[s], "acc"), -validated(ok[s], "nll")), default=None)


# --- final


def tuned(cell: Cell, arm: Arm, rows: Rows) -> tuple[float, float] | None:
    """(strength, learning rate), or None while tuning is not done."""
    lr = chosen(cell, BY_NAME[arm.base], rows)
    strength = lr if arm.is_base else chosen(cell, arm, rows)
    return None if lr is None or strength is None else (strength, lr)


def final(cell: Cell, read: Read) -> Iterator[Recipe]:
    """Seed by seed, so that an unfinished study is paired."""
    for seed in range(cell.seeds):
        for name in cell.arms:
            if found := tuned(cell, BY_NAME[name], read()):
                yield Recipe(cell, name, *found, seed)


def planned(cell: Cell) -> dict[str, int]:
    """Part -> number of its runs."""
    arms = [BY_NAME[name] for name in cell.arms]
    tuning = sum(len(arm.grid) for arm in arms) * len(TUNING_SEEDS)
    ablation = sum(1 for _ in ablations(cell, math.nan))
    averaged = len(AVERAGED_ARMS) * cell.seeds if cell.name in AVERAGED_CELLS else 0
    return {"tuning": tuning, "final": len(arms) * cell.seeds, "ablation": ablation, "averaged": averaged}


def wants_eigenvalue(recipe: Recipe) -> bool:
    return recipe.arm in EIGEN_ARMS and recipe.seed < EIGEN_SEEDS and not recipe.variant


# --- ablations


def ablation(cell: Cell, read: Read) -> Iterator[Recipe]:
    """At the tuned learning rate of LoRA."""
    lr = chosen(cell, BY_NAME["lora"], read())
    if lr is not None:
        yield from ablations(cell, lr)


def ablations(cell: Cell, lr: float) -> Iterator[Recipe]:
    """Of one cell of the text task."""
    if cell.name != ABLATION_CELL:
        return

    def recipe(variant: str, arm: str, strength: float, seed: int, **more: Any) -> Recipe:
        return Recipe(cell, arm, lr if arm == "lora" else strength, lr, seed, variant=variant, **more)

    for seed in range(ABLATION_SEEDS):
        for rho in ABLATED_RHOS:
            for arm in ("flat", "rwp", "rwp-factors"):
                yield recipe("rho", arm, rho, seed)
        for r in (1, 2, 4, 8, 16, 32, 64):
            for arm in ("lora", "flat"):
                yield recipe(f"r={r}", arm, 0.2, seed, options={"r": r, "lora_alpha": 2 * r})
        for when in ("forward", "step"):
            yield recipe(f"resample={when}", "flat", 0.2, seed, options={"resample": when}, accumulate=2)
        for rho in (0.1, 0.2):
            for schedule in ("constant", "linear"):
                yield recipe(f"schedule={schedule}", "flat", rho, seed, options={"schedule": schedule})
        for arm in ("lora", "flat"):
            yield recipe("float32", arm, 0.2, seed, dtype=torch.float32)


# --- averaged predictions


def averaged(cell: Cell, read: Read) -> Iterator[Recipe]:
    """LoRA and Flat-LoRA as tuned, answering with the mean over noise of the strength that Flat-LoRA is tuned to."""
    if cell.name not in AVERAGED_CELLS:
        return
    for seed in range(cell.seeds):
        for name in AVERAGED_ARMS:
            found, rho = tuned(cell, BY_NAME[name], read()), chosen(cell, BY_NAME["flat"], read())
            if found and rho is not None:
                variant = f"averaged={AVERAGED_SAMPLES} rho={rho:g}"
                yield Recipe(cell, name, *found, seed, variant=variant, averaged_rho=rho)
