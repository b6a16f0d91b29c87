"""The tables of the study out of its CSV, as Markdown; of an unfinished study, what is there.

python examples/study/report.py
python examples/study/report.py --csv examples/study/results/text.csv --out report.md
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

STUDY = Path(__file__).resolve().parent
sys.path[:] = [str(STUDY.parent), *(p for p in sys.path if Path(p or ".").resolve() != STUDY)]  # as in run.py

import torch  # noqa: E402
from study import design, stats  # noqa: E402
from study.arithmetic import LM_CELLS  # noqa: E402
from study.arms import BY_NAME  # noqa: E402
from study.images import IMAGE_CELLS  # noqa: E402
from study.tasks import TEXT_CELLS, Cell, paper_cells  # noqa: E402

Row = dict[str, str]
Rows = list[Row]
CELLS = {"text": TEXT_CELLS, "image": IMAGE_CELLS, "lm": LM_CELLS}  # by the stem of the CSV
CELLS |= {f"{name}-paper": paper_cells(name, cells) for name, cells in CELLS.items()}
FEWEST = 2  # seeds, from which there is an interval
NOTES = """\
Differences are paired by seed. In brackets: the 95 % interval of a paired bootstrap over the seeds. p: of the exact
sign-flip test, after Holm's correction over all planned arms of the cell. The simple regularizer is the one of the best
validation score. [PLAN.md](PLAN.md) says what was planned; a claim needs p < 0.05 in the primary outcome."""


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


# --- Markdown


def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def state(cells: list[Cell], rows: Rows) -> str:
    """Runs that are there, and that are planned."""
    lines = []
    for cell in cells:
        for part, planned in design.planned(cell).items():
            if planned:
                there = [row for row in rows if (row["part"], row["cell"]) == (part, cell.name)]
                failed = sum(row["status"] != "ok" for row in there)
                lines.append((cell.name, part, len(there), planned, failed))
    done, planned = sum(line[2] for line in lines), sum(line[3] for line in lines)
    whole = f"**{done} of {planned} planned runs.**"
    commits = ", ".join(f"`{name}`" for name in sorted({row["commit"] for row in rows}))
    made = f"Commits of the runs: {commits}." if rows else ""
    return "\n\n".join([whole, table(["cell", "part", "runs", "planned", "failed"], lines), made]).rstrip()


def tuning(cell: Cell, rows: Rows) -> str | None:
    """What was chosen for each arm that is tuned so far."""
    lines = []
    for name in cell.arms:
        arm = BY_NAME[name]
        found = None if arm.tuned_as else design.tuned(cell, arm, rows)
        if found:
            strength, lr = found
            trial = design.trials(cell, arm, rows)[strength]
            edge = "yes" if strength in (min(arm.grid), max(arm.grid)) else ""
            acc, nll = 100 * design.validated(trial, "acc"), design.validated(trial, "nll")
            lines.append((arm.label, arm.knob, f"{strength:g}", f"{lr:g}", f"{acc:.1f}", f"{nll:.3f}", edge))
    header = ["arm", "strength", "chosen", "learning rate", "validation accuracy, %", "validation NLL", "edge of grid"]
    return table(header, lines) if lines else None


def comparison_table(cell: Cell, rows: Rows, outcome: Outcome) -> str | None:
    """Mean ± standard error of each arm, and its differences to the two references."""
    found = values(cell, rows, outcome)
    if not found:
        return None
    simple, d = best_simple(cell, rows, outcome.by), outcome.digits
    references = ["lora", *([simple] if simple else [])]
    compared = [compare(cell, found, reference) for reference in references]
    header = ["arm", "n", "mean ± s.e."]
    for name in references:
        header += [f"minus {BY_NAME[name].label}", "p"]
    lines = []
    for name, of in found.items():
        mean, error = stats.mean_and_error(torch.tensor(list(of.values()), dtype=torch.float64))
        line = [BY_NAME[name].label, len(of), f"{mean:.{d}f}" + (f" ± {error:.{d}f}" if len(of) > 1 else "")]
        for other in compared:
            line += comparison_text(other.get(name), d)
        lines.append(line)
    return table(header, lines)


def comparison_text(c: Comparison | None, digits: int) -> list[str]:
    if c is None:
        return ["", ""]
    low, high = c.interval
    return [f"{c.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]", f"{c.p:.3f}"]


def prediction(cell: Cell, rows: Rows, named: dict[str, Outcome]) -> str | None:
    """Spearman's rank correlation of sharpness with the gaps, over all final runs of the cell."""
    lines = []
    for name in ("accuracy", "NLL"):
        found = [(named["sharpness"].of(row), named[name].of(row), int(row["seed"])) for row in finals(cell, rows)]
        runs = torch.tensor([run for run in found if all(map(math.isfinite, run))], dtype=torch.float64)
        if len(runs) == 0 or len(runs[:, 2].unique()) < FEWEST:
            continue
        low, high = stats.spearman_interval(*runs.T)
        lines.append((name, len(runs), f"{stats.spearman(*runs.T[:2]):+.2f} [{low:+.2f}, {high:+.2f}]"))
    header = ["gap, train minus test in domain", "runs", "rank correlation with sharpness"]
    return table(header, lines) if lines else None


def ablation(cell: Cell, rows: Rows, shown: list[Outcome]) -> str | None:
    """Means of the ablations; described, nothing is tested."""
    groups: dict[tuple[str, str, str], Rows] = {}
    for row in rows:
        if (row["part"], row["cell"], row["status"]) == ("ablation", cell.name, "ok"):
            groups.setdefault((row["variant"], row["arm"], row["strength"]), []).append(row)
    lines = []
    for (variant, arm, strength), runs in groups.items():
        line = [variant, BY_NAME[arm].label, strength, len(runs)]
        for outcome in shown:
            mean, error = stats.mean_and_error(torch.tensor(list(map(outcome.of, runs)), dtype=torch.float64))
            line.append(f"{mean:.{outcome.digits}f}" + (f" ± {error:.{outcome.digits}f}" if len(runs) > 1 else ""))
        lines.append(line)
    header = ["ablation", "arm", "strength", "n", *(outcome.label for outcome in shown)]
    return table(header, lines) if lines else None


def report(name: str, cells: list[Cell], rows: Rows) -> str:
    """The whole page; sections without a run are left out."""
    parts = [f"# The study: task `{name}`", state(cells, rows), NOTES]
    found = outcomes(rows[0]) if rows else []
    labels = {"sharpness": "Expected sharpness", "accuracy": "Gap of the accuracy", "NLL": "Gap of the NLL"}
    named = {key: outcome for key, start in labels.items() for outcome in found if outcome.label.startswith(start)}
    for cell in cells:
        sections = [("What tuning chose", tuning(cell, rows))]
        sections += [(outcome.label, comparison_table(cell, rows, outcome)) for outcome in found]
        sections += [("Does sharpness predict the gap?", prediction(cell, rows, named))] if named else []
        sections += [("Ablations", ablation(cell, rows, found[:4]))]
        sections = [(title, text) for title, text in sections if text]
        if sections:
            parts.append(f"## Cell `{cell.name}`")
            parts += [f"### {title}\n\n{text}" for title, text in sections]
    return "\n\n".join(parts) + "\n"


def read(path: Path) -> Rows:
    """Whole rows alone: a process may be writing the last."""
    text = path.read_text()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=STUDY / "results" / "text.csv", help="named after its task")
    parser.add_argument("--out", type=Path, help="Markdown file; default: print")
    args = parser.parse_args(arguments)
    if args.csv.stem not in CELLS:
        raise ValueError(f"--csv must be named after a task, one of {sorted(CELLS)}, got {args.csv.name}")
    text = report(args.csv.stem, CELLS[args.csv.stem], read(args.csv) if args.csv.exists() else [])
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")
    return text


if __name__ == "__main__":
    main()
