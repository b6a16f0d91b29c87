"""What it costs to make W + eps: nanoseconds a weight of each backend, against what cannot be avoided.

    python examples/benchmarks/noise.py                 # writes results/noise.csv
    python examples/benchmarks/noise.py --quick

Each round times every contestant once, in turn, so that all see the same machine; the table has the median and the
least over the rounds. All write into a result that exists already.

contestant    what it does
c, triton     the backend of this name (those that the device can run)
torch         the portable backend: torch's generator, 64 rows at a time
reference     the definition of the noise in plain torch (small weights only)
normal+add    z.normal_(), then torch.add(W, z, out=out), even without the standard deviations of the rows
copy          out.copy_(W): the limit set by memory
matmul        the product of 512 tokens with the weight, in ns per weight: what the noise is to vanish beside

bytes is what a weight costs at least: W read once, W + eps written once.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch

from flatlora.ops import perturb_weight, resolve_backend

SIZES = [(256, 256), (576, 576), (576, 1536), (1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008)]
DTYPES = {  # of the weight, of the result
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "fp32 to bf16": (torch.float32, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp64": (torch.float64, torch.float64),
}
TOKENS = 512


def contestants(weight, out, device):
    m, n = weight.shape
    row_std = torch.rand(m, device=device)
    key = torch.tensor([1, 2], device=device)
    z = torch.empty(m, n, device=device, dtype=weight.dtype)
    tokens = torch.randn(TOKENS, n, device=device).to(out.dtype)
    product = torch.empty(TOKENS, m, device=device, dtype=out.dtype)

    def backend(name):
        return lambda: perturb_weight(weight, row_std, key, 0, backend=name, out=out)

    runs = {name: backend(name) for name in ("c", "triton", "torch") if can_run(name, device)}
    if m * n <= 1 << 18:
        runs["reference"] = backend("reference")
    runs["normal+add"] = lambda: torch.add(weight, z.normal_(), out=out)
    runs["copy"] = lambda: out.copy_(weight)
    runs["matmul"] = lambda: torch.mm(tokens, out.t(), out=product)
    return runs


def can_run(name, device):
    try:
        return resolve_backend(name, device) == name
    except ValueError:
        return False


def seconds(run, repeats, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def measure(m, n, kind, rounds, device):
    dtype, out_dtype = DTYPES[kind]
    weight = torch.randn(m, n, device=device).to(dtype)
    out = torch.zeros(m, n, device=device, dtype=out_dtype)
    runs = contestants(weight, out, device)
    repeats = {}
    for name, run in runs.items():
        run()  # first calls allocate, page in, compile
        repeats[name] = max(1, int(0.005 / max(seconds(run, 1, device), 1e-7)))  # about 5 ms, so that the clock is fine
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, repeats[name], device) / (m * n) * 1e9)
    for name, values in times.items():
        yield {
            "contestant": name, "m": m, "n": n, "dtype": kind, "threads": torch.get_num_threads(),
            "median ns": f"{statistics.median(values):.4f}", "least ns": f"{min(values):.4f}",
            "bytes": weight.element_size() + out.element_size(),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three sizes, two dtypes, few rounds")
    parser.add_argument("--rounds", type=int, help="default 15, or 5 with --quick")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "noise.csv")
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.quick else 15)
    sizes = [SIZES[0], SIZES[2], SIZES[4]] if options.quick else SIZES
    kinds = list(DTYPES)[:2] if options.quick else list(DTYPES)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="") as file:
        writer = None
        for kind in kinds:
            for m, n in sizes if kind in ("bf16", "fp32") else sizes[:5]:
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    rows = list(measure(m, n, kind, rounds, options.device))
                    writer = writer or csv.DictWriter(file, rows[0])
                    if file.tell() == 0:
                        writer.writeheader()
                    writer.writerows(rows)
                    file.flush()
                    values = "  ".join(f"{row['contestant']} {float(row['median ns']):.3f}" for row in rows)
                    print(f"{m} x {n} {kind}, {threads} threads, ns per weight: {values}", flush=True)


if __name__ == "__main__":
    main()
