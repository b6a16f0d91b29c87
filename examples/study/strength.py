"""Can rho be chosen before training, by the loss that noise costs the pretrained weights?

    python examples/study/strength.py --task text        # measures: rows in results/strength.csv
    python examples/study/strength.py --table            # compares with what tuning found

The rule: take the largest rho at which the expected loss of the pretrained model rises by no more than a tolerance. A
classifier's new head says nothing before it is trained, so it alone is trained first, with everything else frozen. The
tolerance is fitted on all cells but one, and tested on that one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

STUDY = Path(__file__).resolve().parent
sys.path[:] = [str(STUDY.parent), *(p for p in sys.path if Path(p or ".").resolve() != STUDY)]  # as in run.py

import torch  # noqa: E402
from common import tables  # noqa: E402
from peft import PeftModel  # noqa: E402
from study import design, report  # noqa: E402
from study.arms import BY_NAME, adapt  # noqa: E402
from study.comparisons import CELLS, Rows, number, read  # noqa: E402
from study.run import commit, machine  # noqa: E402
from study.tasks import LOADERS, Cell, Task, load  # noqa: E402

from flatlora.analysis import ExpectedSharpness, expected_sharpness  # noqa: E402

FILE = STUDY / "results" / "strength.csv"
RHOS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
HEAD_STEPS, HEAD_LR = 60, 1e-2
SAMPLES, EXAMPLES = 4, 32
TOLERANCES = (0.003, 0.01, 0.03, 0.1, 0.3)  # nats


def with_trained_head(task: Task, cell: Cell, seed: int) -> PeftModel:
    """The pretrained model; what a LoRA run trains besides the adapters is trained alone."""
    model = adapt(task.base(seed, torch.float32).to(task.device), BY_NAME["lora"], 0.0, seed, 1, task.adapters)
    head = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    if head:
        model.train()
        optimizer = torch.optim.Adam(head, lr=HEAD_LR)
        for batch in itertools.islice(task.batches(task.draw(cell, seed), seed), HEAD_STEPS):
            task.loss(model, task.batch(batch)).backward()
            optimizer.step()
            model.zero_grad()
    return model.eval()


def measure(task: Task, cell: Cell, seed: int) -> ExpectedSharpness:
    """E_eps L(W + eps) - L(W) on training examples."""
    model = with_trained_head(task, cell, seed)
    batch = task.batch(task.chunks(task.draw(cell, seed)[:EXAMPLES], EXAMPLES)[0])
    return expected_sharpness(model, task.loss, [batch], rho=RHOS, samples=SAMPLES, seed=seed, progress=False)


def largest_rho(rhos: list[float], rises: list[float], tolerance: float) -> float:
    """The largest rho up to which the rise stays within the tolerance, linear between the points in log rho.

    Returns:
        the first rho if the rise is above the tolerance there, the last if it never is.
    """
    for (r0, y0), (r1, y1) in itertools.pairwise(zip(rhos, rises, strict=True)):
        if y0 > tolerance:
            return rhos[0]
        if y1 > tolerance:
            share = (tolerance - y0) / (y1 - y0)
            return math.exp((1 - share) * math.log(r0) + share * math.log(r1))
    return rhos[-1]


def run(name: str) -> None:
    """Measure the cells of a task that have no rows."""
    task, _ = load(name)
    rows = tables.read_csv(FILE)
    origin = {"command": f"python examples/study/strength.py --task {name}", "commit": commit()}
    for cell, seed in itertools.product(task.cells, design.TUNING_SEEDS):
        if any((row["task"], row["cell"], row["seed"]) == (name, cell.name, str(seed)) for row in rows):
            continue
        found = measure(task, cell, seed)
        low, high = found.interval()
        for k, rho in enumerate(found.rho.tolist()):
            this = {"task": name, "cell": cell.name, "seed": str(seed), "rho": str(rho), "loss": found.center}
            this |= {"rise": found.mean[k].item(), "low": low[k].item(), "high": high[k].item()}
            rows.append(this | origin | {"machine": machine(task.device)})
        tables.write_csv(FILE, rows)
        print(name, cell.name, seed, " ".join(f"{x:.4f}" for x in found.mean.tolist()), flush=True)


def validation(cell: Cell, rows: Rows, arm: str) -> dict[float, tuple[float, float]]:
    """Strength -> (mean validation accuracy in percent, its standard error over the tuning seeds)."""
    found = {}
    for strength, trial in design.trials(cell, BY_NAME[arm], rows).items():
        scores = torch.tensor([100 * number(row, "acc_validation") for row in trial], dtype=torch.float64)
        if len(scores) == len(design.TUNING_SEEDS):
            found[strength] = (scores.mean().item(), (scores.std() / len(scores) ** 0.5).item())
    return found


@dataclass(frozen=True)
class Measured:
    """A cell with what noise costs before training, and what tuning found.

    Attributes:
        rises: expected rise of the loss at each of RHOS, mean over the seeds.
        scores: strength -> (mean validation accuracy in percent, its standard error).
    """

    label: str
    rises: list[float]
    scores: dict[float, tuple[float, float]]

    def rho(self, tolerance: float) -> float:
        """What the rule gives."""
        return largest_rho(list(RHOS), self.rises, tolerance)

    def accuracy(self, rho: float) -> float:
        """Validation accuracy, linear between the strengths that were tuned in log rho; beyond them that of the end."""
        grid = sorted(self.scores)
        for low, high in itertools.pairwise(grid):
            if rho <= high:
                share = max(0.0, math.log(rho / low) / math.log(high / low))
                return (1 - share) * self.scores[low][0] + share * self.scores[high][0]
        return self.scores[grid[-1]][0]


def cells() -> list[Measured]:
    """The cells that have been measured and tuned."""
    measured, found = tables.read_csv(FILE), []
    for name, of in CELLS.items():
        file = STUDY / "results" / f"{name}.csv"
        for cell in of if file.exists() else []:
            scores = validation(cell, read(file), "flat")
            own = [row for row in measured if (row["task"], row["cell"]) == (name, cell.name)]
            if scores and own:
                rises = {rho: [float(r["rise"]) for r in own if float(r["rho"]) == rho] for rho in RHOS}
                mean = [sum(rises[rho]) / len(rises[rho]) for rho in RHOS]
                found.append(Measured(f"{name} `{cell.name}`", mean, scores))
    return found


def table() -> str:
    """Per cell: validation accuracy at each rho of Flat-LoRA, and the rho that each tolerance gives."""
    lines = []
    for cell in cells():
        accuracies = [f"{mean:.1f} ± {error:.1f}" for mean, error in cell.scores.values()]
        best = max(cell.scores, key=lambda rho: cell.scores[rho][0])
        lines.append(
            [cell.label, *accuracies, f"{best:g}", *(f"{cell.rho(tolerance):.2f}" for tolerance in TOLERANCES)]
        )
    grid = [f"accuracy at rho {rho:g}" for rho in BY_NAME["flat"].grid]
    header = ["cell", *grid, "best", *(f"rho at {t:g} nats" for t in TOLERANCES)]
    return report.table(header, lines)


def held_out(measured: list[Measured]) -> str:
    """The rule with a tolerance fitted on the other cells, against one rho for all that is fitted on them."""

    def mean(of: list[float]) -> float:
        return sum(of) / len(of)

    lines, gains = [], []
    for cell in measured if len(measured) > 1 else []:
        others = [other for other in measured if other is not cell]
        tolerance = max(TOLERANCES, key=lambda t: mean([other.accuracy(other.rho(t)) for other in others]))
        fixed = max(BY_NAME["flat"].grid, key=lambda rho: mean([other.accuracy(rho) for other in others]))
        by_rule, by_fixed = cell.accuracy(cell.rho(tolerance)), cell.accuracy(fixed)
        gains.append(by_rule - by_fixed)
        rho = f"{cell.rho(tolerance):.2f}"
        lines.append([cell.label, f"{tolerance:g}", rho, f"{by_rule:.1f}", f"{fixed:g}", f"{by_fixed:.1f}"])
        lines[-1].append(f"{gains[-1]:+.1f}")
    if lines:
        lines.append(["mean", "", "", "", "", "", f"{mean(gains):+.1f}"])
    header = ["cell", "tolerance of the others", "rho", "accuracy", "best rho of the others", "accuracy", "difference"]
    return report.table(header, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(LOADERS), help="measure the cells of this task")
    parser.add_argument("--table", action="store_true", help="print the comparison")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as the study
    if args.task:
        run(args.task)
    if args.table:
        print(table(), held_out(cells()), sep="\n\n")


if __name__ == "__main__":
    main()
