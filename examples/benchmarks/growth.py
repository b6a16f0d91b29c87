"""How the cost of the noise grows: with the size of a layer, the number of layers, the number of threads.

    python examples/benchmarks/growth.py                # adds to results/growth.csv what is not in it yet
    python examples/benchmarks/growth.py --quick        # a smoke run

A stack of square linear layers, each with LoRA, forward and backward at 512 tokens; no attention, no loss, no
optimizer, so this is the least that the noise can be set beside. Methods and rounds as in step.py. `extra ns` is what
a method costs over plain LoRA per weight of the stack, the median over the rounds with its 95 % interval: where it is
a constant, the cost grows as the number of weights.

sweep      what changes                     what stays
size       width of one layer               1 layer, all threads
layers     number of layers                 width 576, all threads
threads    torch.set_num_threads            8 layers of width 1024
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from add_remove import AddAndRemove
from measure import RESULTS, Budget, Table, alternate, compared, median_interval, provenance
from peft import LoraConfig, get_peft_model
from torch import nn
from workload import DTYPES, RHO

from flatlora import FlatLoraConfig, get_flat_peft_model

TOKENS, RANK = 512, 8
KEY = ("sweep", "width", "layers", "threads", "tokens", "r", "dtype", "method", "machine", "versions", "seed")


def sweeps(threads: int, quick: bool) -> Iterator[tuple[str, int, int, int]]:
    """(sweep, width, layers, threads)."""
    for width in (64, 128) if quick else (256, 512, 1024, 2048, 4096):
        yield "size", width, 1, threads
    for layers in (1, 2) if quick else (1, 2, 4, 8, 16, 32, 64):
        yield "layers", 64 if quick else 576, layers, threads
    for count in range(1, threads + 1):
        yield "threads", 64 if quick else 1024, 2 if quick else 8, count


def passes(method: str, width: int, layers: int, dtype: str, device: torch.device, seed: int) -> Callable[[], None]:
    """Forward and backward through a stack of its own."""
    torch.manual_seed(seed)
    stack = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(device, DTYPES[dtype])
    options = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": [str(i) for i in range(layers)]}
    if method == "flat":
        model = get_flat_peft_model(stack, FlatLoraConfig(rho=RHO, schedule="constant", seed=seed, **options))
    else:
        model = get_peft_model(stack, LoraConfig(**options))
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    x = torch.randn(TOKENS, width, device=device).to(DTYPES[dtype]).requires_grad_()
    grad = torch.randn(TOKENS, width, device=device).to(DTYPES[dtype])

    def run() -> None:
        model(x).backward(grad)
        for p in (x, *parameters):
            p.grad = None

    if method != "add and remove":
        return run
    scheme = AddAndRemove(model, RHO, seed)

    def noisy() -> None:
        with scheme.noise():
            run()

    return noisy


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", nargs="+", choices=["flat", "add and remove"], default=["flat", "add and remove"])
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="the most")
    parser.add_argument("--rounds", type=int, default=25, help="at most, for each point")
    parser.add_argument("--seconds", type=float, default=45, help="for each point, after which no round begins")
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes, after which no point is begun")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small layers, few rounds")
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds")
    parser.add_argument("--csv", type=Path, help="default results/growth.csv, or quick_growth.csv with --quick")
    options = parser.parse_args(arguments)
    rounds = 6 if options.quick else options.rounds
    path = options.csv or RESULTS / ("quick_growth.csv" if options.quick else "growth.csv")
    table, budget = Table(path, KEY, options.fresh), Budget(options.budget)
    origin = provenance(options.device, options.seed)
    for dtype in options.dtype:
        for sweep, width, layers, threads in sweeps(options.threads, options.quick):
            point = {"sweep": sweep, "width": width, "layers": layers, "threads": threads, "tokens": TOKENS, "r": RANK}
            point["dtype"] = dtype
            todo = [name for name in ("lora", *options.method) if not table.has(point | {"method": name} | origin)]
            if not todo:
                continue
            if budget.spent():
                return
            torch.set_num_threads(threads)
            names = ["lora", *(name for name in todo if name != "lora")]
            runs = {name: passes(name, width, layers, dtype, options.device, options.seed) for name in names}
            times = alternate(runs, rounds, options.seconds, options.seed, options.device)
            columns = compared(times, "lora")
            for name in todo:
                columns[name] |= extra(times[name], times["lora"], width * width * layers)
            table.add([point | {"method": name} | columns[name] | origin for name in todo])
            ratios = "  ".join(f"{name} {columns[name]['ratio']} ({columns[name]['extra ns']} ns)" for name in todo)
            print(f"{sweep}: {layers} x {width} x {width} {dtype}, {threads} threads: {ratios}", flush=True)


def extra(times: list[float], base: list[float], weights: int) -> dict[str, str]:
    """Nanoseconds per weight over the baseline."""
    differences = [(t - b) / weights * 1e9 for t, b in zip(times, base, strict=True)]
    low, high = median_interval(differences)
    median = statistics.median(differences)
    return {"extra ns": f"{median:.4f}", "extra low": f"{low:.4f}", "extra high": f"{high:.4f}"}


if __name__ == "__main__":
    main()
