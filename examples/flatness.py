"""How flat are the solutions that `quickstart.py` found? Every measurement of `flatlora.analysis` on its adapters.

    python examples/quickstart.py                      # first: trains, and saves adapters in out/
    python examples/flatness.py                        # then: out/report.html, a page that compares the two

Both adapters are measured on the same examples, along the same random directions and under the same noise:

measurement           of                                      on
loss_line             the merged weight, 21 points            training examples
loss_surface          the merged weight, a grid               training examples
expected_sharpness    the merged weight                       training examples
sam_sharpness         the merged weight, the adapter          training examples
spectral_density      the Hessian in the adapter              training examples, float32
accuracy under noise, rounding and replaced tokens            test examples of the first domain

Results are JSON files in out/METHOD/analysis, written as they are made: an interrupted run goes on from there. What
each took is in out/flatness.csv.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import quickstart
import report as tables
import torch
from data import Encoder, Example
from evaluation import answer_logits, answer_loss
from models import load_model
from peft import PeftModel
from transformers import HfArgumentParser

from flatlora import analysis, plotting
from flatlora import report as page

LABELS = {"lora": "LoRA", "flat": "Flat-LoRA"}


@dataclass
class FlatnessArguments(quickstart.Arguments):
    """How flat are the solutions that quickstart.py found?"""

    points: int = field(default=21, metadata={"help": "of the loss line, from -0.2 to 0.2"})
    grid: int = field(default=9, metadata={"help": "points of the surface along each axis"})
    test_samples: int = field(default=32, metadata={"help": "test examples for the accuracies under disturbance"})
    samples: int = field(default=4, metadata={"help": "antithetic pairs of noise"})
    lanczos_steps: int = field(default=20, metadata={"help": "for the spectrum of the Hessian"})


def loss(model: torch.nn.Module, batch: tuple) -> torch.Tensor:
    return answer_loss(model, *batch)


def measurements(
    args: FlatnessArguments, encode: Encoder, train: list[Example], test: list[Example], device: torch.device
) -> dict[str, Callable[[PeftModel], Any]]:
    """Name -> what to do with the model."""
    batch = [encode(train[: args.picture_samples], device)]
    chunks = [test[i : i + 16] for i in range(0, args.test_samples, 16)]
    tests = [encode(chunk, device) for chunk in chunks]
    sizes = [len(chunk) for chunk in chunks]
    words = encode.answer_ids

    def accuracy(model: torch.nn.Module, batch: tuple) -> torch.Tensor:
        inputs, targets = batch
        answers = words.to(targets.device)[answer_logits(model, inputs)[:, words].argmax(-1)]
        return (answers == targets).double().mean()

    def corrupt(batch: tuple, level: float, generator: torch.Generator) -> tuple:
        inputs, targets = batch
        return replace(inputs, level, generator), targets

    replace = analysis.replace_tokens(len(encode.tokenizer), keep=encode.tokenizer.all_special_ids)
    span = torch.linspace(-0.2, 0.2, args.points).tolist()
    axis = torch.linspace(-0.2, 0.2, args.grid).tolist()
    noise = {"seed": args.seed, "samples": args.samples}
    score = {"score": "accuracy"}
    return {
        "loss_line": lambda m: analysis.loss_line(m, loss, batch, distances=span, directions=3, seed=args.seed),
        "expected_sharpness": lambda m: analysis.expected_sharpness(m, loss, batch, rho=[0.025, 0.05, 0.1], **noise),
        "sam_sharpness_merged_weight": lambda m: analysis.sam_sharpness(m, loss, batch, rho=[0.05, 0.1, 0.2]),
        "sam_sharpness_adapter": lambda m: analysis.sam_sharpness(
            m, loss, batch, rho=[0.05, 0.1, 0.2], space="adapter"
        ),
        "accuracy_under_noise": lambda m: analysis.under_weight_noise(
            m, accuracy, tests, rho=[0.0, 0.1, 0.2, 0.3], sizes=sizes, **noise, **score
        ),
        "accuracy_under_rounding": lambda m: analysis.under_rounding(m, accuracy, tests, bits=[8, 5, 4, 3], **score),
        "accuracy_under_corruption": lambda m: analysis.under_corruption(
            m, accuracy, tests, corrupt, levels=[0.0, 0.1, 0.2, 0.4], unit="replaced tokens", sizes=sizes, **noise,
            **score,
        ),
        "loss_surface": lambda m: analysis.loss_surface(m, loss, batch, x=axis, y=axis, seed=args.seed),
        "hessian_spectrum_adapter": lambda m: analysis.spectral_density(
            analysis.Hessian(m.float(), loss, batch, space="adapter"), samples=2, steps=args.lanczos_steps
        ),
    }  # fmt: skip


def history(folder: Path, method: str) -> None:
    """The quickstart's training.csv as the log that the report reads."""
    with open(folder / "training.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == method]
    log = [{"step": int(row["step"]), "loss": float(row["loss"]), "flat_rho": float(row["rho"])} for row in rows]
    (folder / method / "trainer_state.json").write_text(json.dumps({"log_history": log}))


def main(arguments: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(FlatnessArguments).parse_args_into_dataclasses(arguments)
    device, folder = quickstart.pick_device(args.device), Path(args.output_dir)
    methods = [method for method in LABELS if (folder / method / "adapter").is_dir()]
    if not methods:
        raise FileNotFoundError(f"output_dir {folder} must hold what quickstart.py saved, lora/adapter or flat/adapter")
    encode, task = quickstart.prepare(args)
    todo = measurements(args, encode, task.train, next(iter(task.tests.values())), device)
    times = folder / "flatness.csv"
    rows = list(csv.DictReader(times.open(newline=""))) if times.exists() else []
    machine = tables.machine(device)
    for method in methods:
        history(folder, method)
        base = load_model(args.model, getattr(torch, args.dtype), device)
        model = PeftModel.from_pretrained(base, folder / method / "adapter")
        for name, measure in todo.items():
            file = folder / method / "analysis" / f"{name}.json"
            if file.exists():
                continue
            start = time.perf_counter()
            analysis.save(measure(model), file)
            seconds = round(time.perf_counter() - start, 1)
            where = {"cpu": machine["cpu"], "cores": machine["cores"], "torch": machine["torch"]}
            rows.append({"method": method, "measurement": name, "seconds": seconds, "seed": args.seed} | where)
            tables.write_csv(times, rows)
            print(f"{LABELS[method]:10s} {name:28s} {seconds:6.1f} s", flush=True)
    out = folder / "report.html"
    out.write_text(page.build([folder / method for method in methods], [LABELS[m] for m in methods]), encoding="utf-8")
    draw(folder, methods)
    print(f"The comparison is in {out}")


def draw(folder: Path, methods: list[str]) -> None:
    """The figures by themselves, light."""

    def of(name: str) -> dict[str, Any]:
        return {LABELS[m]: analysis.load(folder / m / "analysis" / f"{name}.json") for m in methods}

    plots = {
        "loss_line_21": lambda: plotting.plot_loss_line(of("loss_line")),
        "expected_sharpness": lambda: plotting.plot_sharpness(of("expected_sharpness")),
        "sam_sharpness_merged_weight": lambda: plotting.plot_sharpness(of("sam_sharpness_merged_weight")),
        "sam_sharpness_adapter": lambda: plotting.plot_sharpness(of("sam_sharpness_adapter")),
        "loss_surface": lambda: plotting.plot_surface(of("loss_surface")),
        "loss_surface_3d": lambda: plotting.plot_surface(of("loss_surface"), kind="3d"),
        "hessian_spectrum_adapter": lambda: plotting.plot_spectrum(of("hessian_spectrum_adapter")),
        **{
            name: lambda name=name: plotting.plot_degradation(of(name))
            for name in ("accuracy_under_noise", "accuracy_under_rounding", "accuracy_under_corruption")
        },
    }
    for name, plot in plots.items():
        plot().savefig(folder / f"{name}.png")


if __name__ == "__main__":
    main()
