"""Make some runs of the study again with the present code, and compare every outcome.

    python examples/study/spot_check.py --task text --rows 10

The rows are drawn at random, with a fixed seed, from the runs that ended well. results/spot_check.csv then has a row
per run: the commits of both, and the largest difference of an outcome.

Rows of the commits below were made before the library had a kernel for the products with A and B, which adds in another
order than torch. They are made again without it.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

STUDY = Path(__file__).resolve().parent
sys.path[:] = [str(STUDY.parent), *(p for p in sys.path if Path(p or ".").resolve() != STUDY)]  # as in run.py

import torch  # noqa: E402
from common import tables  # noqa: E402
from study import design, train  # noqa: E402
from study.comparisons import Row, read  # noqa: E402
from study.records import key  # noqa: E402
from study.run import commit  # noqa: E402
from study.tasks import LOADERS, Task, Tests, load  # noqa: E402

from flatlora.ops import low_rank  # noqa: E402

NOT_OUTCOMES = ("train_seconds", "steps")
BEFORE_THE_KERNEL = ("024c5c2", "3a85f9d", "20a3fc6", "483d1de")


def find_recipe(task: Task, row: Row, rows: list[Row]) -> train.Recipe:
    """The recipe that made a row."""
    cells = [cell for cell in task.cells if cell.name == row["cell"]]
    made = design.runs(row["part"], task, [cell.name for cell in cells], [], lambda: rows)
    return next(recipe for recipe in made if key(recipe.key(row["part"])) == key(row))


def again(task: Task, tests: Tests, row: Row, recipe: train.Recipe) -> dict[str, float]:
    """The outcomes, made anew."""
    if row["part"] == "tuning":
        return train.tune(task, recipe)
    if row["part"] == "averaged":
        return train.averaged(task, recipe, tests, design.AVERAGED_SAMPLES)
    return train.final(task, recipe, tests, bool(row["eigenvalue"]))


def compare(row: Row, made: dict[str, float]) -> tuple[float, str]:
    """(largest difference relative to the value, its outcome); the CSV has seven digits."""
    found = {
        name: abs(value - float(row[name])) / max(abs(float(row[name])), 1e-3)
        for name, value in made.items()
        if name not in NOT_OUTCOMES and row[name]
    }
    worst = max(found, key=lambda name: found[name])
    return found[worst], worst


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(LOADERS), default="text")
    parser.add_argument("--rows", type=int, default=10, help="runs that are made again")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as the study
    task, tests = load(args.task)
    width = low_rank.MIN_WIDTH
    rows = read(STUDY / "results" / f"{args.task}.csv")
    drawn = random.Random(args.seed).sample([row for row in rows if row["status"] == "ok"], args.rows)
    found: list[dict[str, object]] = []
    for row in drawn:
        recipe = find_recipe(task, row, rows)
        with_kernel = not row["commit"].startswith(BEFORE_THE_KERNEL)
        low_rank.MIN_WIDTH = width if with_kernel else sys.maxsize
        difference, outcome = compare(row, again(task, tests, row, recipe))
        names = {name: row[name] for name in ("part", "cell", "arm", "variant", "strength", "lr", "seed")}
        line = {"task": args.task, **names, "commit": row["commit"], "commit now": commit(), "kernel": with_kernel}
        found.append(line | {"largest relative difference": f"{difference:.1e}", "outcome": outcome})
        print(*found[-1].values(), flush=True)
        tables.write_csv(STUDY / "results" / "spot_check.csv", found)
    return found


if __name__ == "__main__":
    main()
