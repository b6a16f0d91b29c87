"""LoRA against Flat-LoRA over several seeds, with intervals: is the difference more than chance?

    python examples/compare.py --seeds 0 1 2

A seed sets the initialization, the order of the training data and the noise; both methods get the same. All options of
`quickstart.py` are understood. Each measurement is written to runs.csv as soon as it is made, and a run that was
interrupted goes on from there.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import quickstart
import torch
from common import tables
from common.models import load_model
from transformers import HfArgumentParser

from flatlora.analysis import Estimate


@dataclass
class CompareArguments(quickstart.Arguments):
    """LoRA against Flat-LoRA over several seeds."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "one run of each method per seed"})
    output_dir: str = field(default="out-compare", metadata={"help": "where runs.csv and summary.json go"})


def run(method: str, seed: int, args: CompareArguments, encode, task, device: torch.device) -> list[dict]:
    """Train once; one row per domain."""
    args = dataclasses.replace(args, seed=seed)
    model = quickstart.adapt(load_model(args.model, getattr(torch, args.dtype), device), method, args)
    quickstart.train(model, method, encode, task.train, args)
    correct = quickstart.test(model, encode, task, args)
    counts = {domain: (len(right), int(right.sum())) for domain, right in correct.items()}
    return [
        {"method": method, "seed": seed, "domain": domain, "examples": n, "correct": hits, "accuracy": hits / n}
        for domain, (n, hits) in counts.items()
    ]


def read_runs(path: Path) -> list[dict]:
    """The rows measured so far."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {"seed": int, "examples": int, "correct": int, "accuracy": float, "rho": float}
    return [{key: numbers.get(key, str)(value) for key, value in row.items()} for row in rows]


def summary(rows: list[dict]) -> list[dict]:
    """Per domain, and for the mean over the domains: both means, and the paired difference over the seeds.

    The interval is Student's, over the seeds: for one test set, whose own sampling error it does not hold.
    """
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    seeds = sorted({row["seed"] for row in rows})
    accuracy = {(row["method"], row["seed"], row["domain"]): row["accuracy"] for row in rows}
    table = {
        method: torch.tensor([[accuracy[method, seed, domain] for domain in domains] for seed in seeds])
        for method in ("lora", "flat")
    }  # (seeds, domains)
    lines = []
    for name, columns in [*((domain, [k]) for k, domain in enumerate(domains)), ("mean", list(range(len(domains))))]:
        lora, flat = (table[method].double()[:, columns].mean(1) for method in ("lora", "flat"))
        difference = Estimate.of(flat - lora)
        low, high = difference.interval()
        means = {"lora": lora.mean().item(), "flat": flat.mean().item()}
        interval = {"difference": difference.estimate, "low": low, "high": high}
        lines.append({"domain": name, "seeds": len(seeds)} | means | interval)
    return lines


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run what is missing from runs.csv, then print and write the summary."""
    (args,) = HfArgumentParser(CompareArguments).parse_args_into_dataclasses(arguments)
    if len(args.seeds) < 2 or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"seeds must be at least two different numbers, got {args.seeds}")
    device = quickstart.pick_device(args.device)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(args)
    encode, task = quickstart.prepare(args)

    rows = same_settings(folder, {key: settings[key] for key in settings if key not in ("seeds", "seed")})
    done = {(row["method"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for method in ("lora", "flat"):
            if (method, seed) not in done:
                print(f"seed {seed}", flush=True)
                rows += run(method, seed, args, encode, task, device)
                tables.write_csv(folder / "runs.csv", rows)
    lines = summary([row for row in rows if row["seed"] in args.seeds])
    result = {"arguments": settings, "machine": tables.machine(device), "summary": lines}
    (folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    for line in lines:
        print(
            f"{line['domain']:10s} LoRA {100 * line['lora']:.1f}  Flat-LoRA {100 * line['flat']:.1f}  difference "
            f"{100 * line['difference']:+.1f} [{100 * line['low']:+.1f}, {100 * line['high']:+.1f}] "
            f"(95 % interval over {line['seeds']} seeds)"
        )
    return lines


def same_settings(folder: Path, settings: dict) -> list[dict]:
    """The rows of an earlier run with these settings; no rows if there is none."""
    file = folder / "settings.json"
    if file.exists() and (found := json.loads(file.read_text())) != settings:
        wrong = ", ".join(key for key in settings if settings[key] != found.get(key))
        raise ValueError(f"{folder} holds runs with other settings ({wrong}): give another --output_dir")
    file.write_text(json.dumps(settings, indent=2) + "\n")
    return read_runs(folder / "runs.csv")


if __name__ == "__main__":
    main()
