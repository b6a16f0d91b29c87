"""The rows of the study compared: outcomes of the final runs, and their differences, paired by seed."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from study import design, stats
from study.arithmetic import LM_CELLS
from study.arms import BY_NAME
from study.images import IMAGE_CELLS
from study.tasks import TEXT_CELLS, Cell, paper_cells

Row = dict[str, str]
Rows = list[Row]
CELLS = {"text": TEXT_CELLS, "image": IMAGE_CELLS, "lm": LM_CELLS}  # by the stem of the CSV
CELLS |= {f"{name}-paper": paper_cells(name, cells) for name, cells in CELLS.items()}
FEWEST = 2  # seeds, from which there is an interval


def read(path: Path) -> Rows:
    """Whole rows alone: a process may be writing the last."""
    text = path.read_text()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


@dataclass(frozen=True)
class Outcome:
    """A number of each final run.

    Attributes:
        label: in the heading, with the direction that is better.
        of: its value in a row; NaN where the row has none.
        digits: after the point.
        by: validation score that chooses the best simple regularizer.
    """

    label: str
    of: Callable[[Row], float]
    digits: int
    by: str = "acc"


def outcomes(columns: Iterable[str]) -> list[Outcome]:
    """The primary outcome first; those that the task has columns for."""
    columns = list(columns)
    domains = test_domains(columns)  # the first is the one trained on
    inside, outside = domains[:1], domains[1:]

    def mean(score: str, where: list[str], scale: float = 1.0) -> Callable[[Row], float]:
        return lambda row: scale * sum(number(row, f"{score}_{name}") for name in where) / len(where)

    def gap(score: str, scale: float = 1.0) -> Callable[[Row], float]:
        return lambda row: scale * (number(row, f"{score}_train") - number(row, f"{score}_{domains[0]}"))

    found = [Outcome("Accuracy out of domain, % (primary)", mean("acc", outside, 100), 1)]
    found += [Outcome("Accuracy in domain, %", mean("acc", inside, 100), 1)]
    for score, name in (("nll", "NLL"), ("brier", "Brier score"), ("ece", "Calibration error")):
        if f"{score}_{domains[0]}" in columns:
            found += [Outcome(f"{name} out of domain, lower is better", mean(score, outside), 3, "nll")]
            found += [Outcome(f"{name} in domain, lower is better", mean(score, inside), 3, "nll")]
    for bits in (8, 4, 3):
        found += [Outcome(f"Accuracy out of domain at {bits} bits, %", mean(f"acc{bits}", outside, 100), 1)]
    found += [Outcome("Gap of the accuracy, train minus test in domain, points", gap("acc", 100), 1)]
    found += [Outcome("Gap of the NLL, train minus test in domain", gap("nll"), 3, "nll")]
    found += [Outcome("Expected sharpness", lambda row: number(row, "sharpness"), 4)]
    for before in columns:
        if before.endswith("_before"):
            found += [Outcome("Forgetting: rise of the NLL of other text, lower is better", rise(before), 4, "nll")]
    found += [Outcome("Top Hessian eigenvalue", lambda row: number(row, "eigenvalue"), 2)]
    return found


def rise(before: str) -> Callable[[Row], float]:
    """Of the NLL of a text that was not trained on, per token."""
    return lambda row: number(row, before.removesuffix("_before")) - number(row, before)


def number(row: Row, column: str) -> float:
    return float(row[column] or "nan")


def test_domains(columns: Iterable[str]) -> list[str]:
    """Names of the tests, as the columns of the CSV give them."""
    return [name[4:] for name in columns if name.startswith("acc_") and name not in ("acc_validation", "acc_train")]


# --- values and comparisons

Values = dict[str, dict[int, float]]  # arm -> seed -> value


def values(cell: Cell, rows: Rows, outcome: Outcome) -> Values:
    """Of the final runs that ended well, at what tuning chose."""
    found: Values = {}
    for name in cell.arms:
        tuned = design.tuned(cell, BY_NAME[name], rows)
        runs = [row for row in finals(cell, rows) if row["arm"] == name]
        runs = [row for row in runs if (number(row, "strength"), number(row, "lr")) == tuned]
        of = {int(row["seed"]): outcome.of(row) for row in runs if math.isfinite(outcome.of(row))}
        if of:
            found[name] = of
    return found


def finals(cell: Cell, rows: Rows) -> Rows:
    return [row for row in rows if (row["part"], row["cell"], row["status"]) == ("final", cell.name, "ok")]


def best_simple(cell: Cell, rows: Rows, by: str) -> str | None:
    """The simple regularizer of the best validation score; None while one of them is not tuned."""
    scores = {}
    for name in cell.arms:
        arm = BY_NAME[name]
        if arm.simple:
            strength = design.chosen(cell, arm, rows)
            if strength is None:
                return None
            trial = design.trials(cell, arm, rows)[strength]
            acc, nll = design.validated(trial, "acc"), design.validated(trial, "nll")
            scores[name] = (acc, -nll) if by == "acc" else (-nll, acc)
    return max(scores, key=lambda name: scores[name], default=None)


@dataclass(frozen=True)
class Comparison:
    """An arm against a reference: mean difference over the common seeds."""

    n: int
    mean: float
    interval: tuple[float, float]
    p: float  # after Holm's correction


def compare(cell: Cell, found: Values, reference: str | None) -> dict[str, Comparison]:
    """Arm -> its comparison; arms without enough common seeds have none."""
    if reference not in found:
        return {}
    others = [name for name in cell.arms if name != reference]
    differences = {name: paired(found[name], found[reference]) for name in others if name in found}
    differences = {name: d for name, d in differences.items() if len(d) >= FEWEST}
    p_values = [stats.sign_flip_p(differences[name]) if name in differences else 1.0 for name in others]
    adjusted = dict(zip(others, stats.holm(p_values), strict=True))
    return {
        name: Comparison(len(d), d.mean().item(), stats.bootstrap_interval(d), adjusted[name])
        for name, d in differences.items()
    }


def paired(values: dict[int, float], reference: dict[int, float]) -> torch.Tensor:
    """Differences at the common seeds, (seeds,)."""
    seeds = sorted(set(values) & set(reference))
    return torch.tensor([values[seed] - reference[seed] for seed in seeds], dtype=torch.float64)
