"""What is left of the frozen weights after 1,000 noisy training steps.

    python examples/benchmarks/drift.py                 # writes results/drift.csv
    python examples/benchmarks/drift.py --quick         # a smoke run

Two layers of SmolLM2-135M's width (random weights; --model smollm2 takes the real ones) are trained for some steps on
16 tokens, at rho = 0.05: by Flat-LoRA as this library does it, and by the add-and-remove scheme (add_remove.py). Then
every weight under an adapter is compared with what it was before: the share of entries that are not the same bits, and
||W - W_0|| / ||W_0||, both over all layers.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import RESULTS, provenance, tables
from torch import Tensor
from workload import METHODS, Trained, Workload, base_model

STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def drift(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, object]:
    """How far the weights are from what they were."""
    count = sum(weight.numel() for weight in before.values())
    changed = sum(int((after[name] != weight).sum()) for name, weight in before.items())
    apart = sum(float((after[name].double() - weight.double()).square().sum()) for name, weight in before.items())
    norm = sum(float(weight.double().square().sum()) for weight in before.values())
    share, relative = changed / count, (apart / norm) ** 0.5
    return {"weights": count, "changed": changed, "changed share": f"{share:.6g}", "relative norm": f"{relative:.6g}"}


def train(trained: Trained, steps: list[int]) -> Iterator[tuple[int, dict[str, object]]]:
    """(steps made, drift) after each of these numbers of steps."""
    before = {name: weight.clone() for name, weight in trained.frozen().items()}
    for k in range(1, max(steps) + 1):
        trained()
        if k in steps:
            yield k, drift(before, trained.frozen())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama2", help="llama2 (default), smollm2, or what from_pretrained takes")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=["flat", "add and remove"])
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 10 steps")
    parser.add_argument("--csv", type=Path, help="default results/drift.csv, or quick_drift.csv with --quick")
    options = parser.parse_args(arguments)
    model, last = ("tiny", 10) if options.quick else (options.model, options.steps)
    path = options.csv or RESULTS / ("quick_drift.csv" if options.quick else "drift.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = sorted({*(k for k in STEPS if k < last), last})
    origin, rows = provenance(options.device, options.seed), []
    for dtype in options.dtype:
        base = base_model(model, dtype, options.device, options.seed)
        for method in options.method:
            trained = METHODS[method](base, Workload(model, tokens=16, dtype=dtype), options.seed)
            for k, found in train(trained, steps):
                rows.append({"model": model, "dtype": dtype, "method": method, "steps": k} | found | origin)
                tables.write_csv(path, rows)
            print(
                f"{dtype} {method}: after {k} steps {100 * float(found['changed share']):.4g} % of "
                f"{found['weights']} weights are changed, relative norm {found['relative norm']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
