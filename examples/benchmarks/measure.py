"""What the benchmarks share: pairs of timings, the interval of a median, the peak of memory, a CSV to go on with."""

from __future__ import annotations

import csv
import math
import os
import random
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report each start and stop

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parents[1]))  # the examples' own modules
from common import tables

RESULTS = Path(__file__).parent / "results"
SHORTEST = 0.1  # seconds of one timing: a shorter step is repeated
LEAST_ROUNDS = 6  # the fewest whose range is a 95 % interval of the median


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Interval of the median from order statistics: exact for any continuous distribution, and no narrower than asked.

    The k-th smallest and the k-th largest of n values enclose the median with probability 1 - 2 P(X < k), where X is
    binomial (n, 1/2). NaN where n is too small for the level (below 6 for 95 %).
    """
    ordered, n, k, outside = sorted(values), len(values), 0, 0.0
    while k < n // 2 and (outside := outside + 2 * math.comb(n, k) / 2**n) <= 1 - level:
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (math.nan, math.nan)


def alternate(
    runs: dict[str, Callable[[], None]],
    rounds: int,
    limit: float = math.inf,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Seconds of each run in each round. A round has each of them once, in an order of its own.

    Args:
        rounds: at most this many.
        limit: seconds after which no other round begins, once there are `LEAST_ROUNDS`.
    """
    device, order, names = torch.device(device), random.Random(seed), list(runs)
    for run in runs.values():  # the first calls allocate and fill caches
        run()
    repeats = {name: max(1, math.ceil(SHORTEST / _seconds(run, 1, device))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for k in range(rounds):
        if k >= LEAST_ROUNDS and time.perf_counter() - start > limit:
            break
        for name in order.sample(names, len(names)):
            times[name].append(_seconds(runs[name], repeats[name], device))
    return times


def _seconds(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def compared(times: dict[str, list[float]], baseline: str) -> dict[str, dict]:
    """Name -> medians, and the ratio to the baseline of the same round: its median with its 95 % interval."""
    columns = {}
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[baseline], strict=True)]
        low, high = median_interval(ratios)
        columns[name] = {
            "rounds": len(values), "ratio": f"{statistics.median(ratios):.4f}",
            "ratio low": f"{low:.4f}", "ratio high": f"{high:.4f}",
            "median s": f"{statistics.median(values):.6f}", "least s": f"{min(values):.6f}",
        }  # fmt: skip
    return columns


def peak_bytes(run: Callable[[], None], device: torch.device | str = "cpu") -> int:
    """The most memory alive at any time during `run()`, above what was alive before it.

    On the CPU it is counted from the allocations that torch's profiler sees, in a thread of its own: a buffer that a
    thread keeps from one step to the next is then allocated anew, and counted.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    sizes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], acc_events=True):  # it wants to be set up in the main thread
        pass

    def profiled() -> None:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            run()
        events = profiler.profiler.kineto_results.events()
        sizes.extend(event.nbytes() for event in events if event.name() == "[memory]")  # negative: given back

    thread = threading.Thread(target=profiled)
    thread.start()
    thread.join()
    if not sizes:
        raise RuntimeError("the profiler has seen no allocation: did the run fail?")
    return max(accumulate(sizes))


class Table:
    """A CSV file that grows row by row; a run that was cut short finds in it what it has measured already.

    Args:
        path: of the file; made at the first row.
        key: the columns that say what was measured. All others are results.
        fresh: forget what the file holds.
    """

    def __init__(self, path: Path, key: Sequence[str], fresh: bool = False) -> None:
        self.path, self.key = path, tuple(key)
        if fresh:
            path.unlink(missing_ok=True)
        self.rows = read(path)
        missing = sorted(set(key) - set(self.rows[0])) if self.rows else []
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}: run with --fresh, or give another --csv")

    def has(self, row: dict) -> bool:
        """Whether this has been measured: `row` holds at least the key."""
        wanted = [str(row[name]) for name in self.key]
        return any([found[name] for name in self.key] == wanted for found in self.rows)

    def add(self, rows: list[dict]) -> None:
        """Append, and have it on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.rows and list(self.rows[0]) != list(rows[0]):
            raise ValueError(f"{self.path} has other columns: run with --fresh, or give another --csv")
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if not self.rows:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += [{name: str(value) for name, value in row.items()} for row in rows]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def provenance(device: torch.device, seed: int) -> dict[str, object]:
    """The last columns of every row: where, with what, and by which command it was made."""
    known = tables.machine(device)
    return {
        "machine": f"{known['cpu']}, {known['cores']} cores, {known['device']}",
        "versions": " ".join(f"{name} {known[name]}" for name in ("python", "torch", "transformers", "peft")),
        "seed": seed,
        "command": shlex.join(["python", f"examples/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


class Budget:
    """Minutes that a run may take; it ends between two configurations."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def spent(self) -> bool:
        """Whether the time is over; says so."""
        if time.monotonic() < self.end:
            return False
        print("The time is over: the same command again goes on from here.", flush=True)
        return True
