"""Where a training step of Flat-LoRA spends its time: in each function of the C kernel, and beside plain LoRA and BAR.

    python examples/benchmarks/parts.py        # writes results/parts.csv

BAR runs the same autograd function without noise. `perturb` is W + eps; `factor` and `add_product` are the
products with A and B, in the steps of Flat-LoRA alone. Milliseconds per step: medians over the rounds, in which the
methods alternate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, Table, alternate, provenance
from workload import METHODS, Workload, base_model

from flatlora.ops import native

FUNCTIONS = ("perturb", "factor", "add_product")
METHOD_NAMES = ("lora", "flat", "bar")


class Timed:
    """The kernel's library, with the seconds that each function takes."""

    def __init__(self, library: Any) -> None:
        self.library, self.seconds = library, dict.fromkeys(FUNCTIONS, 0.0)

    def __getattr__(self, name: str) -> Any:
        function, short = getattr(self.library, name), name.removeprefix("flatlora_")
        return self.timed(function, short) if short in FUNCTIONS else function

    def timed(self, function: Callable, name: str) -> Callable:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds[name] += time.perf_counter() - start
            return result

        return call


def parts(step: Callable[[], None], rounds: int) -> dict[str, float]:
    """Function -> median milliseconds in a step."""
    timed = native.LIBRARY = Timed(native.LIBRARY)
    found: dict[str, list[float]] = {name: [] for name in FUNCTIONS}
    try:
        for _ in range(rounds):
            timed.seconds = dict.fromkeys(FUNCTIONS, 0.0)
            step()
            for name in FUNCTIONS:
                found[name].append(1e3 * timed.seconds[name])
    finally:
        native.LIBRARY = timed.library
    return {name: statistics.median(values) for name, values in found.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama6")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--csv", type=Path, default=RESULTS / "parts.csv")
    options = parser.parse_args(arguments)
    table = Table(options.csv, ["model", "tokens"], fresh=True)
    device = torch.device("cpu")
    for tokens in options.tokens:
        work = Workload(options.model, tokens=tokens, length=options.length, r=8, dtype="bf16")
        base = base_model(options.model, "bf16", device, 0)
        steps = {name: METHODS[name](base, work, 0) for name in METHOD_NAMES}
        times = alternate(steps, options.rounds)
        row = {"model": options.model, "tokens": tokens, "threads": torch.get_num_threads()}
        row |= {f"{name} ms": f"{1e3 * statistics.median(values):.1f}" for name, values in times.items()}
        row |= {f"{name} ms": f"{ms:.1f}" for name, ms in parts(steps["flat"], options.rounds).items()}
        print(row, flush=True)
        table.add([row | provenance(device, 0)])


if __name__ == "__main__":
    main()
