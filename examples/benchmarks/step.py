"""What a training step costs: Flat-LoRA and others against plain LoRA, time and memory.

    python examples/benchmarks/step.py                  # adds to results/step.csv what is not in it yet
    python examples/benchmarks/step.py --quick          # a smoke run
    python examples/benchmarks/step.py --model smollm2 --tokens 512 2048 --r 8

A step is forward, backward and AdamW on the adapters. Each round times every method once, in an order of its own; the
ratio is to plain LoRA in the same round, and the table has its median with a 95 % interval from order statistics.

method            what it does
lora              the baseline
lora again        the same once more: what the machine alone makes of two equal things
flat              Flat-LoRA as this library does it
add and remove    Flat-LoRA as its authors describe it, written to be fast: see add_remove.py
two passes        LoRA-SAM, written by hand

and, where asked for with --method, the others of this library: efmlora, fmlora, lora-sam, rwp, rwp adapter, bilora,
bar.

Memory is the peak during a step above what is alive between steps (weights, adapters, optimizer state: `model bytes`),
from torch's profiler, in a step that is not timed. The configurations are all of tokens x dtype x checkpointing at the
first rank, then the other ranks at 512 tokens (the first count, if 512 is not asked for) without checkpointing.
"""

import argparse
import itertools
from dataclasses import asdict, replace
from pathlib import Path

import torch
from measure import RESULTS, Budget, Table, alternate, compared, peak_bytes, provenance
from workload import FLAT_LORA, KINDS, METHODS, Workload, base_model

CONFIGURATION = ("model", "tokens", "length", "r", "dtype", "adapters", "checkpointing", "kind", "threads")
KEY = (*CONFIGURATION, "method", "machine", "versions", "seed")


def configurations(options) -> list[Workload]:
    """What to measure, the most telling first."""
    first = Workload(options.model, length=options.length, r=options.r[0], adapters=options.adapters)
    cells = itertools.product(options.kind, options.checkpointing, options.tokens, options.dtype)
    works = [replace(first, kind=k, tokens=t, dtype=d, checkpointing=c == "on") for k, c, t, d in cells]
    tokens = 512 if 512 in options.tokens else options.tokens[0]
    works += [replace(first, tokens=tokens, dtype=d, r=r) for r in options.r[1:] for d in options.dtype]
    return works


def measure(work: Workload, methods: list[str], options) -> dict[str, dict]:
    """Method -> columns."""
    base = base_model(work.model, work.dtype, options.device, options.seed)
    steps = {name: METHODS[name](base, work, options.seed) for name in methods}
    del base
    columns = compared(alternate(steps, options.rounds, options.seconds, options.seed, options.device), "lora")
    for name, step in steps.items():
        columns[name]["peak bytes"] = peak_bytes(step, options.device)
        columns[name]["model bytes"] = resident_bytes(step)
    return columns


def resident_bytes(step) -> int:
    """Bytes of the weights, the adapters and the optimizer's state."""
    state = [value for values in step.optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in [*step.model.parameters(), *state])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama6", help="llama6 (default), smollm2, or what from_pretrained takes")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(FLAT_LORA), help="see above")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 128, 256, 1024, 4096], help="per step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--r", type=int, nargs="+", default=[8, 4, 16, 32, 64])
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--adapters", choices=["fp32", "base"], default="fp32", help="dtype of the LoRA factors")
    parser.add_argument("--checkpointing", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=["plain"], help="of adapters or weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=25, help="at most, for each configuration")
    parser.add_argument("--seconds", type=float, default=90, help="for each configuration, after which no round begins")
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes, after which none is begun")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one small configuration of each kind, few rounds")
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds")
    parser.add_argument("--csv", type=Path, default=RESULTS / "step.csv")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens, options.r, options.rounds = [64], [8, 16], 6
        options.model = "tiny" if options.model == "llama6" else options.model
        options.csv = options.csv.with_name("quick_step.csv") if options.csv == RESULTS / "step.csv" else options.csv
    if options.rounds < 6:
        parser.error(f"--rounds must be >= 6 for a 95 % interval, got {options.rounds}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    table, budget = Table(options.csv, KEY, options.fresh), Budget(options.budget)
    methods = ["lora", *(name for name in options.method if name != "lora")]
    origin = provenance(options.device, options.seed)
    for work in configurations(options):
        row = asdict(work) | {"threads": options.threads}
        todo = [name for name in methods if not table.has(row | {"method": name} | origin)]
        if not todo:
            continue
        if budget.spent():
            break
        columns = measure(work, ["lora", *(name for name in todo if name != "lora")], options)
        table.add([row | {"method": name} | columns[name] | origin for name in todo])
        show(row, columns)


def show(row: dict, columns: dict[str, dict]) -> None:
    print(", ".join(f"{name} {row[name]}" for name in CONFIGURATION))
    lora = columns["lora"]
    for name, c in columns.items():
        extra = (c["peak bytes"] - lora["peak bytes"]) / 2**20
        print(
            f"  {name:15s} {c['ratio']} [{c['ratio low']}, {c['ratio high']}]  {float(c['median s']):.4f} s  "
            f"peak {c['peak bytes'] / 2**20:.1f} MiB ({extra:+.1f}), {c['rounds']} rounds",
            flush=True,
        )


if __name__ == "__main__":
    main()
