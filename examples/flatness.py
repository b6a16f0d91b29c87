"""How flat are the solutions that `language_model.py` found? Every measurement of `flatlora.analysis` on its adapters.

    python examples/language_model.py                      # first: trains, and saves adapters in out/
    python examples/flatness.py                        # then: out/tables.html, a page that compares them

All adapters are measured on the same examples and under the same noise. Lines and surfaces run along directions that
are the same to the bit for all of them, their rows as long as those of the base weight.

measurement           of                                      on
loss_line             the merged weight, 21 points            training examples
loss_surface          the merged weight, a grid               training examples
expected_sharpness    the merged weight                       training examples
sam_sharpness         the merged weight, the adapter          training examples
spectral_density      the Hessian: of the merged weights of   training examples, float32
                      the last block, of all adapters
accuracy under noise, rounding and replaced tokens            test examples of the first domain

Results are JSON files in out/METHOD/analysis, written as they are made: an interrupted run goes on from there. What
each took is in out/flatness.csv, the command and the machine in out/flatness.json.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import language_model
import torch
from common import tables
from common.data import Encoder, Example
from common.evaluation import answer_logits, answer_loss
from common.models import load_model
from peft import PeftModel
from torch import Tensor
from transformers import HfArgumentParser

from flatlora import analysis, plotting
from flatlora import report as page

LABELS = {method: tables.NAMES[method] for method in language_model.METHODS["all"]}
PLOTS: dict[str, Callable[..., Any]] = {
    "loss_line": plotting.plot_loss_line,
    "expected_sharpness": plotting.plot_sharpness,
    "sam_sharpness_merged_weight": plotting.plot_sharpness,
    "sam_sharpness_adapter": plotting.plot_sharpness,
    "accuracy_under_noise": plotting.plot_degradation,
    "accuracy_under_rounding": plotting.plot_degradation,
    "accuracy_under_corruption": plotting.plot_degradation,
    "loss_surface": plotting.plot_surface,
    "hessian_spectrum_last_block": plotting.plot_spectrum,
    "hessian_spectrum_adapter": plotting.plot_spectrum,
}


@dataclass
class FlatnessArguments(language_model.Arguments):
    """How flat are the solutions that language_model.py found?"""

    only: list[str] = field(
        default_factory=list, metadata={"help": "measurements to make, loss_line and the like; default all"}
    )
    points: int = field(default=21, metadata={"help": "of the loss line, from -0.2 to 0.2"})
    grid: int = field(default=9, metadata={"help": "points of the surface along each axis"})
    test_samples: int = field(default=32, metadata={"help": "test examples for the accuracies under disturbance"})
    samples: int = field(default=4, metadata={"help": "antithetic pairs of noise"})
    ascent_steps: int = field(default=3, metadata={"help": "of the gradient ascent to the worst perturbation"})
    lanczos_steps: int = field(default=20, metadata={"help": "for the spectrum of the Hessian"})


def loss(model: torch.nn.Module, batch: tuple) -> Tensor:
    return answer_loss(model, *batch)


def measurements(
    args: FlatnessArguments, encode: Encoder, train: list[Example], test: list[Example], norms: dict[str, Tensor]
) -> dict[str, Callable[[PeftModel], Any]]:
    """Name -> what to do with the model. `norms` are the base weight's row norms."""
    device = next(iter(norms.values())).device
    some = train[: args.picture_samples]
    batch, quarters = [encode(some, device)], [encode(chunk, device) for chunk in chunks_of(some, len(some) // 4)]
    held_out = chunks_of(test[: args.test_samples], args.test_samples // 4)  # their spread is rounding's interval
    tests, sizes = [encode(chunk, device) for chunk in held_out], [len(chunk) for chunk in held_out]
    words = encode.answer_ids

    def accuracy(model: torch.nn.Module, batch: tuple) -> Tensor:
        inputs, targets = batch
        answers = words.to(targets.device)[answer_logits(model, inputs)[:, words].argmax(-1)]
        return (answers == targets).double().mean()

    def corrupt(batch: tuple, level: float, generator: torch.Generator) -> tuple:
        inputs, targets = batch
        return replace(inputs, level, generator), targets

    def spectrum(model: PeftModel, **settings: Any) -> analysis.SpectralDensity:
        hessian = analysis.Hessian(model.float(), loss, batch, **settings)
        return analysis.spectral_density(hessian, samples=2, steps=args.lanczos_steps)

    replace = analysis.replace_tokens(len(encode.tokenizer), keep=encode.tokenizer.all_special_ids)
    span = torch.linspace(-0.2, 0.2, args.points).tolist()
    axis = torch.linspace(-0.2, 0.2, args.grid).tolist()
    along = {"seed": args.seed, "norms": norms}
    noise = {"seed": args.seed, "samples": args.samples}
    worst = {"rho": [0.05, 0.1, 0.2], "steps": args.ascent_steps}
    score = {"score": "accuracy"}
    in_last_block = partial(is_in_block, max(map(block, norms)))
    return {
        "loss_line": lambda m: analysis.loss_line(m, loss, batch, distances=span, directions=3, **along),
        "expected_sharpness": lambda m: analysis.expected_sharpness(m, loss, batch, rho=[0.025, 0.05, 0.1], **noise),
        "sam_sharpness_merged_weight": lambda m: analysis.sam_sharpness(m, loss, quarters, **worst),
        "sam_sharpness_adapter": lambda m: analysis.sam_sharpness(m, loss, quarters, space="adapter", **worst),
        "accuracy_under_noise": lambda m: analysis.under_weight_noise(
            m, accuracy, tests, rho=[0.0, 0.1, 0.2, 0.3], sizes=sizes, **noise, **score
        ),
        "accuracy_under_rounding": lambda m: analysis.under_rounding(m, accuracy, tests, bits=[8, 5, 4, 3], **score),
        "accuracy_under_corruption": lambda m: analysis.under_corruption(
            m, accuracy, tests, corrupt, levels=[0.0, 0.1, 0.2, 0.4], unit="part of the tokens replaced", sizes=sizes,
            **noise, **score,
        ),
        "loss_surface": lambda m: analysis.loss_surface(m, loss, batch, x=axis, y=axis, **along),
        "hessian_spectrum_last_block": lambda m: spectrum(m, layers=in_last_block),
        "hessian_spectrum_adapter": lambda m: spectrum(m, space="adapter"),
    }  # fmt: skip


def chunks_of(examples: list[Example], size: int) -> list[list[Example]]:
    """The examples in batches."""
    size = max(1, size)
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def block(name: str) -> int:
    """Number of the transformer block that a layer is in, -1 for none."""
    return max((int(part) for part in name.split(".") if part.isdigit()), default=-1)


def is_in_block(number: int, name: str) -> bool:
    return block(name) == number


def history(folder: Path, method: str) -> None:
    """The training.csv of language_model.py as the log that the report reads."""
    rows = [row for row in tables.read_csv(folder / "training.csv") if row["method"] == method]
    log = [{"step": int(row["step"]), "loss": float(row["loss"]), "flat_rho": float(row["rho"])} for row in rows]
    (folder / method / "trainer_state.json").write_text(json.dumps({"log_history": log}))


def main(arguments: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(FlatnessArguments).parse_args_into_dataclasses(arguments)
    command = shlex.join(["python", *(sys.argv if arguments is None else ["examples/flatness.py", *arguments])])
    settings, device, folder = asdict(args), language_model.pick_device(args.device), Path(args.output_dir)
    methods = [method for method in LABELS if (folder / method / "adapter").is_dir()]
    if unknown := set(args.only) - set(PLOTS):
        raise ValueError(f"only must be some of {list(PLOTS)}, got {sorted(unknown)}")
    if not methods:
        raise FileNotFoundError(
            f"output_dir {folder} must hold what language_model.py saved, lora/adapter or flat/adapter"
        )
    encode, task = language_model.prepare(args)
    times = folder / "flatness.csv"
    rows = tables.read_csv(times)
    about = {"command": command, "arguments": settings, "machine": tables.machine(device)}
    (folder / "flatness.json").write_text(json.dumps(about, indent=2) + "\n")
    for method in methods:
        history(folder, method)
        base = load_model(args.model, getattr(torch, args.dtype), device)
        norms = analysis.merged_row_norms(base)
        todo = measurements(args, encode, task.train, next(iter(task.tests.values())), norms)
        model = PeftModel.from_pretrained(base, folder / method / "adapter")
        for name, measure in todo.items():
            if args.only and name not in args.only:
                continue
            file = folder / method / "analysis" / f"{name}.json"
            if file.exists():
                continue
            start, used = time.perf_counter(), time.process_time()
            analysis.save(measure(model), file)
            seconds, used = round(time.perf_counter() - start, 1), round(time.process_time() - used, 1)
            row = {"method": method, "measurement": name, "seconds": seconds, "cpu_seconds": used, "seed": args.seed}
            rows.append(row)
            tables.write_csv(times, rows)
            print(f"{LABELS[method]:10s} {name:28s} {seconds:6.1f} s", flush=True)
    out = folder / "tables.html"
    out.write_text(page.build([folder / method for method in methods], [LABELS[m] for m in methods]), encoding="utf-8")
    draw(folder, methods)
    print(f"The comparison is in {out}, the figures by themselves in {folder / 'figures'}")


def draw(folder: Path, methods: list[str]) -> None:
    """The figures by themselves, light and dark."""

    def of(name: str) -> dict[str, Any]:
        files = {LABELS[m]: folder / m / "analysis" / f"{name}.json" for m in methods}
        return {label: analysis.load(file) for label, file in files.items() if file.exists()}

    logs = {LABELS[m]: json.loads((folder / m / "trainer_state.json").read_text())["log_history"] for m in methods}
    plots = {name: (plot, of(name)) for name, plot in PLOTS.items()}
    plots |= {"loss_surface_3d": (partial(plotting.plot_surface, kind="3d"), of("loss_surface"))}
    plots |= {"training": (plotting.plot_training, logs)}
    (folder / "figures").mkdir(exist_ok=True)
    for (name, (plot, results)), theme in product(plots.items(), ("light", "dark")):
        if results:
            plot(results, theme=theme).savefig(folder / "figures" / f"{name}_{theme}.png", dpi=110)


if __name__ == "__main__":
    main()
