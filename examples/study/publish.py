"""Write what the study found into README, the documentation and the full reports, out of the CSV files.

    python examples/study/publish.py            # after new runs
    python examples/study/publish.py --check    # says what is not up to date

A page holds `<!-- study: NAME -->` and `<!-- /study -->`; what stands between them is written by this script. The text
around them is written by hand, and must be read again after new runs.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

STUDY = Path(__file__).resolve().parent
sys.path[:] = [str(STUDY.parent), *(p for p in sys.path if Path(p or ".").resolve() != STUDY)]  # as in run.py

from study import design, report, strength  # noqa: E402
from study.arms import BY_NAME, CORE  # noqa: E402
from study.comparisons import CELLS, FEWEST, Outcome, Row, Rows, best_simple, compare, outcomes, paired, read, values  # noqa: E402
from study.pictures import Differences, plot_differences  # noqa: E402
from study.records import key  # noqa: E402
from study.stats import bootstrap_interval  # noqa: E402
from study.tasks import Cell  # noqa: E402

ROOT, RESULTS = STUDY.parents[1], STUDY / "results"
PAGES = [ROOT / "README.md", ROOT / ".docs" / "pages" / "study.md"]
FIGURE = RESULTS / "differences"
QUICKSTART = ROOT / "examples" / "results" / "quickstart"
AGAIN = ("Accuracy in domain", "NLL out of domain")  # what is shown of the quickstart besides the primary outcome
POOLED = ("Accuracy out of domain", "Accuracy in domain", "NLL out of domain", "NLL in domain")
TASKS = {"text": "sentiment, MiniLM", "image": "Fashion-MNIST, EfficientNet-lite0", "lm": "arithmetic, SmolLM2-135M"}
BLOCK = re.compile(r"(<!-- study: ([\w-]+) -->\n).*?(\n?<!-- /study -->)", re.DOTALL)
UNIT = "points of accuracy out of domain, minus LoRA"


def all_rows() -> dict[str, Rows]:
    """Task -> the rows of its CSV; tasks without a file are left out."""
    return {name: read(RESULTS / f"{name}.csv") for name in TASKS if (RESULTS / f"{name}.csv").exists()}


def cells_with(found: dict[str, Rows]) -> list[tuple[str, Cell, Rows, Outcome]]:
    """(task, cell, rows, primary outcome) of the cells in which LoRA and Flat-LoRA have final runs."""
    made = []
    for task, rows in found.items():
        for cell in CELLS[task] if rows else []:
            primary = outcomes(rows[0])[0]
            of = values(cell, rows, primary)
            if {"lora", "flat"} <= of.keys() and len(paired(of["flat"], of["lora"])) >= FEWEST:
                made.append((task, cell, rows, primary))
    return made


def headline(found: dict[str, Rows], arm: str = "flat") -> str:
    """A row per cell: LoRA, an arm, and the arm's differences to LoRA and to the best simple regularizer."""
    lines = []
    for task, cell, rows, primary in cells_with(found):
        of, simple = values(cell, rows, primary), best_simple(cell, rows, "acc")
        line = [f"{TASKS[task]}, `{cell.name}`", str(len(paired(of[arm], of["lora"])))]
        line += [report.mean_text(of[name], 1) for name in ("lora", arm)]
        for reference in ("lora", simple):
            line += report.comparison_text(compare(cell, of, reference).get(arm), 1)
        lines.append([*line, BY_NAME[simple].label.removeprefix("LoRA, ") if simple else ""])
    label = BY_NAME[arm].label
    header = ["task and cell", "n", "LoRA", label, "minus LoRA", "p", "minus the best simple regularizer", "p", "which"]
    return report.table(header, lines)


def primary_tables(found: dict[str, Rows], task: str) -> str:
    """The primary outcome of every arm, a table per cell of a task."""
    parts = []
    for name, cell, rows, primary in cells_with(found):
        if name == task:
            parts.append(f"**Cell `{cell.name}`**\n\n{report.comparison_table(cell, rows, primary)}")
    return "\n\n".join(parts) or "No final runs yet."


def strengths(found: dict[str, Rows], arms: tuple[str, ...] = ("flat", "rwp")) -> str:
    """Validation accuracy and NLL at each strength that was tried, and of LoRA at the same learning rate."""
    lines = []
    for task, rows in found.items():
        for cell in CELLS[task]:
            base = report.validation_text(cell, BY_NAME["lora"], design.chosen(cell, BY_NAME["lora"], rows), rows)
            for name in arms if base else ():
                arm = BY_NAME[name]
                tried = [report.validation_text(cell, arm, strength, rows) for strength in arm.grid]
                if all(tried):
                    lines.append([f"{task} `{cell.name}`", arm.label, base, *tried])
    grid = [f"rho {rho:g}" for rho in BY_NAME[arms[0]].grid]
    return report.table(["task and cell", "noise", "LoRA", *grid], lines)


def described(found: dict[str, Rows], part: Callable[[Cell, Rows, list[Outcome]], str | None], scores: int) -> str:
    """A described part of every cell that has it.

    Args:
        part: `report.ablation`, `report.ablation_pairs` or `report.averaged`.
        scores: how many of accuracy, NLL, Brier score and calibration error are shown.
    """
    parts = []
    for task, rows in found.items():
        shown = [outcome for outcome in outcomes(rows[0]) if "out of domain" in outcome.label][:scores] if rows else []
        for cell in CELLS[task]:
            if text := part(cell, rows, shown):
                parts.append(f"**{task} `{cell.name}`**\n\n{text}")
    return "\n\n".join(parts) or "No runs yet."


def repeated(found: dict[str, Rows], arm: str = "flat") -> str:
    """An arm's difference to LoRA in the study, with the other seeds of the quickstart, and with both together."""
    runs = [row for file in sorted(QUICKSTART.glob("runs*.csv")) for row in read(file)]
    lines = []
    for task, cell, rows, primary in cells_with(found):
        other = [{**row, "part": "final"} for row in runs if row["cell"] == cell.name]
        tuning = [row for row in rows if row["part"] == "tuning"]
        for outcome in (primary, *(o for o in outcomes(rows[0]) if o.label.startswith(AGAIN))) if other else ():
            parts = [values(cell, part, outcome) for part in (rows, tuning + other, rows + other)]
            line = [f"{task} `{cell.name}`", outcome.label.removesuffix(" (primary)")]
            for of in parts:
                d = paired(of[arm], of["lora"])
                low, high = (f"{x:+.{outcome.digits}f}" for x in bootstrap_interval(d))
                line.append(f"{d.mean():+.{outcome.digits}f} [{low}, {high}], n = {len(d)}")
            lines.append(line)
    return report.table(["cell", "outcome", "study", "other seeds", "both"], lines)


def complete(found: dict[str, Rows]) -> tuple[list[tuple[str, Cell, Rows, Outcome]], tuple[str, ...]]:
    """(the cells of most seeds in which every arm that they share has all its final runs, these arms)."""
    most = max(cell.seeds for task in found for cell in CELLS[task])
    planned = [cell for task in found for cell in CELLS[task] if cell.seeds == most]
    arms = tuple(arm for arm in BY_NAME if all(arm in cell.arms for cell in planned))

    def is_complete(cell: Cell, rows: Rows, primary: Outcome) -> bool:
        of = values(cell, rows, primary)
        return cell.seeds == most and all(len(of.get(arm, ())) == most for arm in arms)

    return [(task, *entry) for task, *entry in cells_with(found) if is_complete(*entry)], arms


def pooled(found: dict[str, Rows]) -> str:
    """The arms against LoRA over all complete cells together. Exploratory.

    The value of an arm at a seed is its mean over the cells, so that there is one number for each seed, as in a cell.
    """
    cells, arms = complete(found)
    if not cells:
        return "No complete cell yet."
    common, names = replace(cells[0][1], arms=arms), ", ".join(f"{task} `{cell.name}`" for task, cell, _, _ in cells)
    header, lines = ["arm"], {arm: [BY_NAME[arm].label] for arm in arms if arm != "lora"}
    for label in POOLED:
        digits = named(cells[0][2], label).digits
        measured = [values(cell, rows, named(rows, label)) for _, cell, rows, _ in cells]
        mean = {
            arm: {seed: sum(of[arm][seed] for of in measured) / len(measured) for seed in range(common.seeds)}
            for arm in arms
        }
        for arm, comparison in compare(common, mean, "lora").items():
            lines[arm] += report.comparison_text(comparison, digits)
        header += [f"{label}, minus LoRA", "p"]
    return f"{names}; n = {common.seeds} seeds.\n\n{report.table(header, lines.values())}"


def named(rows: Rows, label: str) -> Outcome:
    """The outcome whose label begins so, up to its comma."""
    return next(outcome for outcome in outcomes(rows[0]) if outcome.label.startswith(f"{label},"))


def machines(found: dict[str, Rows]) -> str:
    """How far an outcome moves when a final run is made again on another processor."""
    rows = [row for row in read(RESULTS / "text_other_machine.csv") if row["part"] == "final"]
    lines = []
    for outcome in outcomes(rows[0])[:4]:
        moved = [
            abs(outcome.of(row) - outcome.of(again)) for row in rows for again in found["text"] if same(row, again)
        ]
        d = outcome.digits + 1
        mean, largest = sum(moved) / len(moved), max(moved)
        lines.append([outcome.label.removesuffix(" (primary)"), len(moved), f"{mean:.{d}f}", f"{largest:.{d}f}"])
    return report.table(["outcome", "runs", "mean difference", "largest"], lines)


def same(row: Row, other: Row) -> bool:
    """Whether two rows are of one run, with other results."""
    return key(row) == key(other) and row["machine"] != other["machine"]


def state(found: dict[str, Rows]) -> str:
    """How many of the planned runs are there."""
    lines = []
    for task in TASKS:
        for cell in CELLS[task]:
            lines += [(task, *line) for line in report.counts([cell], found.get(task, []))]
    done, planned = sum(line[3] for line in lines), sum(line[4] for line in lines)
    header = ["task", "cell", "part", "runs", "planned", "failed"]
    return f"{done} of {planned} planned runs.\n\n{report.table(header, lines)}"


def blocks(found: dict[str, Rows]) -> dict[str, str]:
    """Name of a block -> its Markdown."""
    made = {f"primary-{task}": primary_tables(found, task) for task in TASKS}
    made |= {"headline": headline(found), "state": state(found), "strengths": strengths(found)}
    made |= {"ablations": described(found, report.ablation, 2), "averaged": described(found, report.averaged, 4)}
    made |= {"ablation-pairs": described(found, report.ablation_pairs, 2)}
    return made | {
        "rule": strength.table(),
        "rule-held-out": strength.held_out(strength.cells()),
        "repeated": repeated(found),
        "machines": machines(found),
        "pooled": pooled(found),
    }


def filled(text: str, made: dict[str, str]) -> str:
    """A page with its blocks as they are now."""
    return BLOCK.sub(lambda m: f"{m[1]}{made[m[2]]}\n<!-- /study -->", text)


def panels(found: dict[str, Rows]) -> dict[str, Differences]:
    """Cell -> core arm -> differences to LoRA in the primary outcome, for the figure."""
    made: dict[str, Differences] = {}
    for task, cell, rows, primary in cells_with(found):
        of = values(cell, rows, primary)
        arms = [name for name in CORE if name != "lora" and name in cell.arms]
        differences = {
            BY_NAME[name].label.removeprefix("LoRA, "): paired(of.get(name, {}), of["lora"]) for name in arms
        }
        made[f"{task} {cell.name}"] = differences
    return made


def digest(differences: dict[str, Differences]) -> str:
    """Of the numbers in the figure; the file carries it, so that a test can tell whether it is up to date."""
    numbers = {cell: {arm: d.tolist() for arm, d in of.items()} for cell, of in differences.items()}
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


def outdated(write: bool) -> list[Path]:
    """The files that are not what the CSV files say; they are written if asked."""
    found = all_rows()
    made = blocks(found)
    wanted = {page: filled(page.read_text(), made) for page in PAGES}
    wanted |= {RESULTS / f"{task}.md": report.report(task, CELLS[task], rows) for task, rows in found.items()}
    wrong = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    differences = panels(found)
    figures = [FIGURE.with_name(f"{FIGURE.name}_{theme}.png") for theme in ("light", "dark")]
    name = digest(differences).encode()
    wrong += [path for path in figures if not path.exists() or name not in path.read_bytes()]
    if write:
        for path in wrong:
            if path.suffix == ".png":
                figure = plot_differences(differences, UNIT, path.stem.rpartition("_")[2])
                figure.savefig(path, dpi=120, metadata={"Description": digest(differences)})
            else:
                path.write_text(wanted[path])
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; the exit status is 1 if something is old")
    args = parser.parse_args(arguments)
    wrong = outdated(write=not args.check)
    for path in wrong:
        print(path.relative_to(ROOT), "is outdated" if args.check else "written")
    return int(args.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
