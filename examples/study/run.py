"""The study of PLAN.md: all of it or any part by one command, which goes on where it was interrupted.

    python examples/study/run.py
    python examples/study/run.py --task text --part tuning final --max-minutes 60
    python examples/study/run.py --task text --part final --cells 128-clean --skip efmlora

Each run, failed ones too, adds a row to results/TASK.csv with its command, commit, seed, machine and seconds; a run
that has a row is not made again. SIGTERM and Ctrl-C stop it; the run in progress is lost, nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

STUDY = Path(__file__).resolve().parent
sys.path[:] = [str(STUDY.parent), *(p for p in sys.path if Path(p or ".").resolve() != STUDY)]
if "--paper" not in sys.argv:  # whose models come from the hub
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from common.tables import machine as describe  # noqa: E402
from study import design, train  # noqa: E402
from study.arms import BY_NAME  # noqa: E402
from study.records import Records, key  # noqa: E402
from study.tasks import LOADERS, Task, Tests, load, paper  # noqa: E402
from tqdm import tqdm  # noqa: E402

LARGEST_ERROR = 300  # characters of a message that are kept


class Stopped(BaseException):
    """Raised at SIGTERM; no `except Exception` holds it."""


def stop(number: int, frame: Any) -> None:
    raise Stopped


def commit() -> str:
    """The commit of the code, with + if something is not committed; results do not count."""
    git = ["git", "-C", str(STUDY)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = [*git, "status", "--porcelain", "--", ":/flatlora", ":/examples", ":!/examples/study/results"]
    return (head[:12] or "none") + ("+" if subprocess.run(changed, capture_output=True, text=True).stdout else "")


def machine(device: torch.device) -> str:
    about = describe(device)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    cores = f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads"
    cores += f", {about['device']}" if device.type != "cpu" else ""
    return f"{cores}; Python {platform.python_version()}, {versions}"


def attempt(do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The outcomes of a run, or what went wrong, with the seconds that it took."""
    start = time.perf_counter()
    try:
        row = {"status": "ok", "error": "", **do()}
    except Exception as error:  # a failed run is a result
        row = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:LARGEST_ERROR]}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def make_runs(
    part: str, task: Task, tests: Tests, recipes: Iterable[train.Recipe], records: Records, origin: dict, until: float
) -> bool:
    """Make the runs that have no row, until the time is over; whether all were made."""
    progress = tqdm(desc=f"{task.name} {part}", unit=" runs", disable=None)
    for recipe in recipes:
        this = recipe.key(part)
        if key(this) in {key(row) for row in records.rows()}:
            continue
        if time.monotonic() > until:
            return False
        if part == "tuning":
            row = attempt(lambda: train.tune(task, recipe))  # noqa: B023  # called at once
        elif part == "averaged":
            row = attempt(lambda: train.averaged(task, recipe, tests, design.AVERAGED_SAMPLES))  # noqa: B023
        else:
            row = attempt(lambda: train.final(task, recipe, tests, design.wants_eigenvalue(recipe)))  # noqa: B023
        finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        records.append(this | origin | {"finished": finished} | row)
        progress.update()
        shown = row["error"] or " ".join(f"{k} {v:.3f}" for k, v in row.items() if k.startswith("acc_"))
        tqdm.write(f"{' '.join(map(str, key(this)))}: {shown} ({row['seconds']} s)")
    return True


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(LOADERS), default=list(LOADERS), help="in this order")
    parser.add_argument("--part", nargs="+", choices=design.PARTS, default=list(design.PARTS), help="in this order")
    parser.add_argument("--cells", nargs="+", help="default: all of the tasks")
    parser.add_argument("--skip", nargs="+", default=[], choices=list(BY_NAME), metavar="ARM", help="for later")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="no run is begun after this time")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the study is made with one")
    parser.add_argument("--paper", action="store_true", help="larger models, every arm in every cell, on a GPU")
    parser.add_argument("--output", type=Path, default=STUDY / "results", help="folder of the CSV files")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> bool:
    """Make what is missing; whether nothing is left."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to one another
    if args.paper and not torch.cuda.is_available():
        raise ValueError("--paper must have a GPU, torch finds none: leave it out for the study of PLAN.md")
    until = time.monotonic() + 60 * args.max_minutes
    loaded = [load(name) for name in args.task]
    if args.paper:
        loaded = [(paper(task, torch.device("cuda")), tests) for task, tests in loaded]
    known = [cell.name for task, _ in loaded for cell in task.cells]
    if unknown := set(args.cells or []) - set(known):
        raise ValueError(f"cells must be of {known}, got {sorted(unknown)}")
    command = shlex.join(["python", "examples/study/run.py", *(sys.argv[1:] if arguments is None else arguments)])
    before = signal.signal(signal.SIGTERM, stop)
    try:
        for (task, tests), part in itertools.product(loaded, args.part):
            records = Records(args.output / f"{task.name}.csv", train.columns(task))
            origin = {"command": command, "commit": commit(), "machine": machine(task.device)}
            recipes = design.runs(part, task, args.cells or known, args.skip, records.rows)
            if not make_runs(part, task, tests, recipes, records, origin, until):
                print("Time is over: the same command goes on.", flush=True)
                return False
    except (Stopped, KeyboardInterrupt):
        print("Stopped: the same command goes on.", flush=True)
        return False
    finally:
        signal.signal(signal.SIGTERM, before)
    return True


if __name__ == "__main__":
    main()
