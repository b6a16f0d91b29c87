"""Tables and files of `language_model.py`."""

from __future__ import annotations

import csv
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from common.evaluation import paired_difference, wilson

Correct = dict[str, dict[str, Tensor]]  # method -> domain -> (examples,) bool
NAMES = {"before": "before training", "lora": "LoRA", "flat": "Flat-LoRA", "efmlora": "EFMLoRA"}


class Laps:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.last, self.seconds = time.perf_counter(), {}

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 1), now


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were made on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def accuracy_rows(correct: Correct) -> list[dict]:
    """One row per method and domain: the accuracy and its 95 % Wilson interval."""
    rows = []
    for method, domains in correct.items():
        for domain, right in domains.items():
            n, hits = len(right), int(right.sum())
            low, high = wilson(hits, n)
            row = {"method": method, "domain": domain, "examples": n, "correct": hits, "accuracy": hits / n}
            rows.append(row | {"low": low, "high": high})
    return rows


def difference_rows(correct: Correct) -> list[dict]:
    """One row per domain: Flat-LoRA's accuracy minus LoRA's on the same examples, with its paired 95 % interval."""
    if not {"lora", "flat"} <= set(correct):
        return []
    rows = []
    for domain, lora in correct["lora"].items():
        difference, half = paired_difference(lora, correct["flat"][domain])
        rows.append({"domain": domain, "examples": len(lora), "difference": difference, "half_width": half})
    return rows


def table(results: dict) -> str:
    """The accuracies as text, a line per method and a column per domain."""
    rows, differences = results["accuracy"], results["flat_minus_lora"]
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    titles = [f"{domain} ({'in domain' if k == 0 else 'new domain'})" for k, domain in enumerate(domains)]
    lines = [["accuracy, % [95 % interval]", *titles]]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [
            f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            for row in rows
            if row["method"] == method
        ]
        lines.append([NAMES[method], *cells])
    if differences:
        cells = [f"{100 * row['difference']:+.1f} ± {100 * row['half_width']:.1f}" for row in differences]
        lines.append(["Flat-LoRA minus LoRA", *cells])
    text = aligned(lines).splitlines()
    rule = text[1]
    counts = sorted({row["examples"] for row in rows})
    size = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    note = f"{size} test examples per domain, one seed; the last line is paired, on the same examples."
    return "\n".join([*text, rule, note if differences else note.partition(";")[0] + "."])


def aligned(rows: list[list[str]]) -> str:
    """Columns of equal width, with a rule under the first row."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([text[0], "-" * (sum(widths) + 2 * len(widths) - 2), *text[1:]])


def reload_table(reloaded: dict[str, dict]) -> str:
    """What the fresh process found, as text."""
    lines = ["In a fresh process without flatlora:"]
    for method, check in reloaded.items():
        n, difference = check["examples"], check["largest_logit_difference"]
        lines.append(
            f"  {NAMES[method]}: adapter in stock peft, {check['same_answers']} of {n} answers the same (logits within "
            f"{difference:.2g}); merged, {check['same_answers_merged']} of {n} (rounded to the model's dtype)"
        )
    return "\n".join(lines)


def write(folder: Path, results: dict, history: list[dict]) -> None:
    """results.json, accuracy.csv and training.csv (loss and strength of the noise at every step)."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    write_csv(folder / "accuracy.csv", results["accuracy"])
    write_csv(folder / "training.csv", history)


def read_csv(path: Path) -> list[dict]:
    """What `write_csv` wrote; nothing if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows with the same keys, under a header."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
