"""All runs of a recipe: one row of results.csv per run, a table of means, and a report page."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import torch
from common import tables

from flatlora.analysis import Estimate

from .arguments import RecipeArguments, command, settings
from .processes import is_main, state

Run = Callable[[str, int, Path], dict[str, float]]
NOT_METRICS = ("method", "seed", "command", "machine")  # columns of results.csv
COSTS = ("train_seconds", "steps")  # ends of the names of those that say what a run took


def run_all(args: RecipeArguments, run: Run, arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Make the runs that results.csv lacks, and print and write the means.

    `output_dir` then holds results.csv (one row per run), summary.csv (means and paired differences), settings.json,
    report.html, and a folder METHOD-seedN per run.

    Args:
        run: (method, seed, folder of the run) -> metrics. Called in the order of the seeds.
        arguments: of the command line; default: those of the process.

    Returns:
        the rows of summary.csv.

    Raises:
        ValueError: `output_dir` holds runs with other settings.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with state().main_process_first():
        check_settings(folder, args)
    rows = tables.read_csv(folder / "results.csv")
    for seed in args.seeds:
        for method in args.method:
            if any((row["method"], row["seed"]) == (method, str(seed)) for row in rows):
                continue
            if is_main():
                print(f"{method}, seed {seed}", flush=True)
            metrics = run(method, seed, folder / f"{method}-seed{seed}")
            if is_main():
                origin = {"command": command(arguments), "machine": _machine()}
                rows.append({"method": method, "seed": str(seed), **metrics, **origin})
                tables.write_csv(folder / "results.csv", rows)
    if not is_main():
        return []
    lines = summary(rows, args.method, args.seeds)
    tables.write_csv(folder / "summary.csv", lines)
    write_report(folder, rows, lines, args)
    print("\n" + as_text(lines))
    print(f"\nresults.csv, summary.csv and report.html are in {folder}")
    return lines


def check_settings(folder: Path, args: RecipeArguments) -> None:
    """Write settings.json, or raise if it has other settings than these."""
    file, now = folder / "settings.json", settings(args)
    if file.exists() and (found := json.loads(file.read_text())) != now:
        wrong = ", ".join(f"--{key} {found.get(key)}" for key in now if now[key] != found.get(key))
        raise ValueError(f"{folder} holds runs with other settings ({wrong}): give another --output_dir")
    if is_main():
        file.write_text(json.dumps(now, indent=2) + "\n")


def _machine() -> str:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    about = tables.machine(device or torch.device("cpu"))
    return ", ".join(f"{key} {about[key]}" for key in ("cpu", "cores", "device", "torch", "transformers", "peft"))


def summary(rows: list[dict[str, Any]], methods: list[str], seeds: list[int]) -> list[dict[str, Any]]:
    """Mean and standard error of each metric over the seeds, and the difference to the first method.

    The difference is paired by seed, with Student's 95 % interval; with one seed there is neither error nor interval.
    What a run took, its seconds and steps, is no metric.
    """
    known = {(row["method"], int(row["seed"])): row for row in rows}
    metrics = [key for key in rows[0] if key not in NOT_METRICS and not key.endswith(COSTS)] if rows else []
    lines = []
    for method in methods:
        both = [s for s in seeds if (method, s) in known and (methods[0], s) in known]
        for metric in metrics:
            own, first = (
                torch.tensor([float(known[name, s][metric]) for s in both], dtype=torch.float64)
                for name in (method, methods[0])
            )
            line: dict[str, Any] = {"method": method, "metric": metric, "n": len(both), "mean": own.mean().item()}
            line["error"] = (own.std() / len(both) ** 0.5).item() if len(both) > 1 else ""
            line |= {"difference": "", "low": "", "high": ""}
            if method != methods[0]:
                line["difference"] = (own - first).mean().item()
                if len(both) > 1:
                    line["low"], line["high"] = Estimate.of(own - first).interval()
            lines.append(line)
    return lines


def as_table(lines: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a method per row, a metric per column."""
    metrics = list(dict.fromkeys(line["metric"] for line in lines))
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        own = {line["metric"]: line for line in lines if line["method"] == method}
        rows.append([method, str(own[metrics[0]]["n"]), *(_cell(own[metric]) for metric in metrics)])
    return ["method", "n", *metrics], rows


def _cell(line: dict[str, Any]) -> str:
    text = f"{line['mean']:.4g}"
    if line["error"] != "":
        text += f" ± {line['error']:.2g}"
    if line["low"] != "":
        text += f" ({line['difference']:+.2g} [{line['low']:+.2g}, {line['high']:+.2g}])"
    return text


NOTE = (
    "Mean ± standard error over the seeds; in parentheses the difference to the first method, paired by seed, "
    "with its 95 % interval."
)


def _note(lines: list[dict[str, Any]]) -> list[str]:
    """What the cells say, if there are several seeds."""
    return [NOTE] if any(line["n"] > 1 for line in lines) else []


def as_text(lines: list[dict[str, Any]]) -> str:
    """The table for a terminal."""
    head, rows = as_table(lines)
    return "\n".join([tables.aligned([head, *rows]), *_note(lines)])


def write_report(folder: Path, rows: list[dict[str, Any]], lines: list[dict[str, Any]], args: RecipeArguments) -> None:
    """report.html: the table, what each run took, the PNG pictures of the runs, their settings and training curves."""
    from flatlora import report
    from flatlora.report import page

    runs = [folder / f"{method}-seed{args.seeds[0]}" for method in args.method]
    pictures = "".join(_picture(file) for run in runs for file in sorted(run.glob("*.png")))
    costs = [key for key in rows[0] if key.endswith(COSTS)]
    took = [[row["method"], str(row["seed"]), *(str(row[key]) for key in costs)] for row in rows]
    notes = "".join(f"<p class=note>{escape(note)}</p>\n" for note in _note(lines))
    top = f"<h2>Results</h2>\n{page.table(*as_table(lines))}{notes}{pictures}"
    top += f"<h2>Runs</h2>\n{page.table(['method', 'seed', *costs], took)}" if costs else ""
    if kept := [run for run in runs if run.is_dir()]:
        (folder / "report.html").write_text(report.build(kept, introduction=top))


def _picture(file: Path) -> str:
    """The picture, inside the page."""
    data, title = base64.b64encode(file.read_bytes()).decode(), f"{file.parent.name}: {file.stem}"
    return f'<h2>{escape(title)}</h2>\n<img src="data:image/png;base64,{data}" alt="{escape(title)}">\n'
