"""The tables of the study out of its CSV, as Markdown; of an unfinished study, what is there.

python examples/study/report.py
python examples/study/report.py --csv examples/study/results/text.csv --out report.md
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

STUDY = Path(__file__).resolve().parent
sys.path[:] = [str(STUDY.parent), *(p for p in sys.path if Path(p or ".").resolve() != STUDY)]  # as in run.py

import torch  # noqa: E402
from study import design, stats  # noqa: E402
from study.arms import BY_NAME, Arm  # noqa: E402
from study.comparisons import (  # noqa: E402
    CELLS,
    FEWEST,
    Comparison,
    Outcome,
    Rows,
    Values,
    best_simple,
    compare,
    finals,
    outcomes,
    paired,
    read,
    values,
)
from study.tasks import Cell  # noqa: E402

NOTES = """\
Differences are paired by seed. In brackets: the 95 % interval of a paired bootstrap over the seeds. p: of the exact
sign-flip test, after Holm's correction over all planned arms of the cell. The simple regularizer is the one of the best
validation score. [PLAN.md](PLAN.md) says what was planned; a claim needs p < 0.05 in the primary outcome."""


def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def state(cells: list[Cell], rows: Rows) -> str:
    """Runs that are there, and that are planned."""
    lines = counts(cells, rows)
    done, planned = sum(line[2] for line in lines), sum(line[3] for line in lines)
    whole = f"**{done} of {planned} planned runs.**"
    commits = ", ".join(f"`{name}`" for name in sorted({row["commit"] for row in rows}))
    made = f"Commits of the runs: {commits}." if rows else ""
    return "\n\n".join([whole, table(["cell", "part", "runs", "planned", "failed"], lines), made]).rstrip()


def counts(cells: list[Cell], rows: Rows) -> list[tuple[str, str, int, int, int]]:
    """(cell, part, runs, planned, failed), without parts that a cell does not have."""
    lines = []
    for cell in cells:
        for part, planned in design.planned(cell).items():
            if planned:
                there = [row for row in rows if (row["part"], row["cell"]) == (part, cell.name)]
                lines.append((cell.name, part, len(there), planned, sum(row["status"] != "ok" for row in there)))
    return lines


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
        line = [BY_NAME[name].label, len(of), mean_text(of, d)]
        for other in compared:
            line += comparison_text(other.get(name), d)
        lines.append(line)
    return table(header, lines)


def validation_text(cell: Cell, arm: Arm, strength: float | None, rows: Rows) -> str:
    """Validation accuracy in percent and NLL at a strength; empty while a trial is missing."""
    trial = design.trials(cell, arm, rows).get(strength, []) if strength is not None else []
    if len(trial) < len(design.TUNING_SEEDS):
        return ""
    return f"{100 * design.validated(trial, 'acc'):.1f}, {design.validated(trial, 'nll'):.3f}"


def mean_text(of: dict[int, float], digits: int) -> str:
    """Mean ± standard error over the seeds."""
    mean, error = stats.mean_and_error(torch.tensor(list(of.values()), dtype=torch.float64))
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(of) > 1 else "")


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
    """Means of the ablations and their differences to LoRA; described, nothing is tested.

    LoRA is that of the same ablation where it has one, or else that of rank 8. The latter does not split its batches,
    as the ablation `resample` does.
    """
    groups = ablated(cell, rows)
    plain = {variant: runs for (variant, arm, _), runs in groups.items() if arm == "lora"}
    lines = []
    for (variant, arm, strength), runs in groups.items():
        line = [variant, BY_NAME[arm].label, "" if arm == "lora" else strength, len(runs)]
        reference = [] if arm == "lora" else plain.get(variant, plain.get(design.ABLATION_REFERENCE, []))
        for outcome in shown:
            of, base = by_seed(runs, outcome), by_seed(reference, outcome)
            line += [mean_text(of, outcome.digits), difference_text(of, base, outcome.digits)]
        lines.append(line)
    header = ["ablation", "arm", "strength", "n"]
    for outcome in shown:
        header += [outcome.label, "minus LoRA"]
    return table(header, lines) if lines else None


def ablated(cell: Cell, rows: Rows) -> dict[tuple[str, str, str], Rows]:
    """(variant, arm, strength) -> its runs, one for each seed."""
    groups: dict[tuple[str, str, str], Rows] = {}
    for row in rows:
        if (row["part"], row["cell"], row["status"]) == ("ablation", cell.name, "ok"):
            groups.setdefault((row["variant"], row["arm"], row["strength"]), []).append(row)
    return groups


def by_seed(runs: Rows, outcome: Outcome) -> dict[int, float]:
    return {int(row["seed"]): outcome.of(row) for row in runs}


def ablation_pairs(cell: Cell, rows: Rows, shown: list[Outcome]) -> str | None:
    """Differences between two ablations, paired by seed; described, nothing is tested."""
    groups = {
        (variant, arm, None if arm == "lora" else float(strength)): runs
        for (variant, arm, strength), runs in ablated(cell, rows).items()
    }
    lines = []
    for label, one, other in design.ABLATION_PAIRS:
        if one in groups and other in groups:
            sides = [(by_seed(groups[one], o), by_seed(groups[other], o), o.digits) for o in shown]
            n = len(paired(*sides[0][:2]))
            lines.append([label, n, *(difference_text(*side) for side in sides)])
    return table(["compared", "n", *(outcome.label for outcome in shown)], lines) if lines else None


def averaged(cell: Cell, rows: Rows, found: list[Outcome]) -> str | None:
    """What averaging the prediction over noise changes; described, nothing is tested."""
    lines = []
    for outcome in found:
        plain, simple, d = values(cell, rows, outcome), best_simple(cell, rows, outcome.by), outcome.digits
        for name, of in averages(cell, rows, outcome).items():
            line = [outcome.label, f"{BY_NAME[name].label}, averaged", len(of), mean_text(of, d)]
            line += [difference_text(of, plain.get(other, {}), d) for other in (name, "lora", simple or "")]
            lines.append(line)
    against = ["minus itself, not averaged", "minus LoRA", "minus the best simple regularizer"]
    return table(["outcome", "arm", "n", "mean ± s.e.", *against], lines) if lines else None


def averages(cell: Cell, rows: Rows, outcome: Outcome) -> Values:
    """Of the runs that answer with an averaged prediction."""
    found: Values = {}
    for row in rows:
        if (row["part"], row["cell"], row["status"]) == ("averaged", cell.name, "ok"):
            found.setdefault(row["arm"], {})[int(row["seed"])] = outcome.of(row)
    return found


def difference_text(of: dict[int, float], reference: dict[int, float], digits: int) -> str:
    d = paired(of, reference)
    if len(d) < FEWEST:
        return ""
    low, high = stats.bootstrap_interval(d)
    return f"{d.mean().item():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


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
        by_domain = [outcome for outcome in found if "out of domain" in outcome.label][:4]
        sections += [("Averaged prediction", averaged(cell, rows, by_domain))]
        sections += [("Ablations", ablation(cell, rows, found[:4]))]
        sections += [("Ablations compared with one another", ablation_pairs(cell, rows, found[:4]))]
        sections = [(title, text) for title, text in sections if text]
        if sections:
            parts.append(f"## Cell `{cell.name}`")
            parts += [f"### {title}\n\n{text}" for title, text in sections]
    return "\n\n".join(parts) + "\n"


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
