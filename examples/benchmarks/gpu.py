"""All that costs time and memory on a GPU, measured on one of them in under 10 minutes.

    python examples/benchmarks/gpu.py              # writes results/gpu.csv
    python examples/benchmarks/gpu.py --dry-run    # the same code on a CPU with tiny sizes: shows that it runs

Part "kernel": nanoseconds per weight and GB/s, from the counted bytes of W and W + eps, of

merged          row norms of W + s B A and W + eps in one kernel (rank 16)
perturb         W + eps of given standard deviations, in one kernel
norms, perturb  the row norms by products with A, then `perturb`
dequantize      bitsandbytes' own kernel, where W has 4 bits, then `perturb`
normal+add      z.normal_(), then torch.add(W, z, out=out), without the standard deviations of the rows
copy            out.copy_(W), the limit set by memory

Part "step": a training step of Flat-LoRA over one of plain LoRA of the same kind, on four layers of the width of an 8B
Llama. Kind "graph" captures forward and backward in a CUDA graph and replays it; rho_t and the sample change from step
to step. Peak memory is above what is alive between steps.

Each round runs all contestants once, in an order of its own; a row has the median of the ratios to the baseline of the
same round (copy, LoRA) with a 95 % interval. With --dry-run the Triton kernels run in Triton's interpreter, nothing is
captured, and no file is written: its times say nothing.
"""

import argparse
import os
import sys
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from measure import RESULTS, Budget, Table, alternate, compared, peak_bytes, provenance
from torch import nn
from workload import DTYPES, RHO, SIZES, FlatLora, Lora, Workload, base_model

from flatlora import FlatLoraConfig, get_flat_peft_model, perturbation
from flatlora.layers.quantized_rows import FourBitRows
from flatlora.ops import merged_row_norms, perturb_weight, squared_row_norms

SIZES["llama4"] = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=8192, tie_word_embeddings=True,
)  # fmt: skip
SHAPES = [(4096, 4096), (14336, 4096), (1024, 4096)]
KERNELS = {  # W, W + eps, bits of W: bytes per weight of W
    "bf16": ("bf16", "bf16", 2.0),
    "fp32": ("fp32", "fp32", 4.0),
    "fp32 to bf16": ("fp32", "bf16", 4.0),
    "nf4": ("nf4", "bf16", 0.5 + 4 / 64),
    "nf4 double": ("nf4", "bf16", 0.5 + 1 / 64 + 4 / (64 * 256)),
}
STEPS = {  # dtype, 4 bits, options of LoRA, checkpointing, graph
    "bf16": ("bf16", False, {}, False, False),
    "fp32": ("fp32", False, {}, False, False),
    "4 bits": ("bf16", True, {}, False, False),
    "dropout": ("bf16", False, {"lora_dropout": 0.1}, False, False),
    "DoRA": ("bf16", False, {"use_dora": True}, False, False),
    "checkpointing": ("bf16", False, {}, True, False),
    "graph": ("bf16", False, {}, False, True),
}
RANK = 16
KEY = ("part", "kind", "m", "n", "tokens", "contestant", "machine", "versions", "seed")


# ---- kernels ----


def quantized(weight: torch.Tensor, double: bool) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, compress_statistics=double,
        quant_type="nf4",
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=double)
    return layer.to(weight.device)


def contestants(m: int, n: int, kind: str, options) -> dict:
    """Name -> what is timed."""
    stored, result, _ = KERNELS[kind]
    device = options.device
    dense = torch.randn(m, n, device=device).to(DTYPES["bf16" if stored == "nf4" else stored])
    out = torch.empty(m, n, device=device, dtype=DTYPES[result])
    B, A = torch.randn(m, RANK, device=device), torch.randn(RANK, n, device=device)
    norms, key, z = torch.rand(m, device=device), torch.tensor([1, 2], device=device), torch.empty_like(out)
    strength = torch.full((), RHO, device=device)
    weight, squared = dense, squared_row_norms(dense)
    if stored == "nf4":
        import bitsandbytes.functional as F

        rows = FourBitRows(quantized(dense, kind.endswith("double")))
        weight = rows.in_four_bits()

    def perturb(w, **more):
        return perturb_weight(w, norms, key, 0, backend=options.backend, out=out, relative=strength, **more)

    def norms_then_perturb():
        norms.copy_(merged_row_norms(dense, squared, B, A, 0.5))
        perturb(dense)

    runs = {
        "copy": lambda: out.copy_(dense),
        "merged": lambda: perturb(weight, factors=(B, A, 0.5)),
        "perturb": lambda: perturb(weight),
        "normal+add": lambda: torch.add(dense, z.normal_(), out=out),
    }
    if stored == "nf4":
        runs["dequantize"] = lambda: perturb(F.dequantize_4bit(rows.packed, rows.state))
    else:
        runs["norms, perturb"] = norms_then_perturb
    return runs


def kernel_rows(m: int, n: int, kind: str, options) -> list[dict]:
    runs = contestants(m, n, kind, options)
    columns = compared(alternate(runs, options.rounds, options.seconds, options.seed, options.device), "copy")
    moved = KERNELS[kind][2] + DTYPES[KERNELS[kind][1]].itemsize
    for found in columns.values():
        found["ns per weight"] = f"{1e9 * float(found['median s']) / (m * n):.6f}"
        found["counted bytes per weight"] = f"{moved:.4f}"
        found["GB/s of counted bytes"] = f"{moved * m * n / float(found['median s']) / 1e9:.1f}"
        found["peak bytes"] = ""
    return [{"part": "kernel", "kind": kind, "m": m, "n": n, "tokens": ""} | named(columns, name) for name in columns]


def named(columns: dict, name: str) -> dict:
    return {"contestant": name} | columns[name]


# ---- steps ----


class Kind(Lora):
    """Plain LoRA of one kind, eager or captured."""

    def __init__(self, base, work, kind, seed=0):
        self.kind = kind
        super().__init__(base, work, seed)
        self.graph = None
        if STEPS[kind][4]:
            self.capture()

    def noise(self):
        """The perturbation, if there is one."""

    def capture(self):
        for _ in range(3):  # the first steps allocate, and choose block sizes
            self.gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
        noise = self.noise()
        if noise is not None:
            noise.graph.prepare(self.device)
        if self.device.type == "cuda":  # a dry run has nothing to capture on
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.gradients()

    def __call__(self):
        if not STEPS[self.kind][4]:
            return super().__call__()
        if self.noise() is not None:
            self.noise().graph.update()
        if self.graph is None:
            self.gradients()
        else:
            self.graph.replay()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.graph is None)  # a graph writes the gradients where they were


class FlatKind(Kind, FlatLora):
    """Flat-LoRA of the same kind."""

    def adapt(self, base, options, **kwargs):
        config = FlatLoraConfig(rho=RHO, schedule="cosine", total_steps=10**6, seed=0, **options)
        return get_flat_peft_model(base, config, **kwargs)

    def noise(self):
        return perturbation(self.model)


def step_base(kind: str, options) -> nn.Module:
    dtype, four_bit = STEPS[kind][:2]
    model = base_model(options.model, dtype, options.device, options.seed)
    if four_bit:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and "lm_head" not in name:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, quantized(layer.weight.detach(), True))
        model.is_loaded_in_4bit = True  # peft asks
    return model


def step_rows(kind: str, tokens: int, options) -> list[dict]:
    dtype, _, settings, checkpointing, _ = STEPS[kind]
    work = Workload(options.model, tokens, min(tokens, 512), RANK, dtype, "fp32", checkpointing)
    base = step_base(kind, options)
    steps = {}
    for name, method in (("lora", Kind), ("flat", FlatKind)):
        made = type(method.__name__, (method,), {
            "adapt": lambda self, base, given, made=method, **more: made.adapt(self, base, given | settings, **more)
        })  # fmt: skip
        steps[name] = made(base, work, kind, options.seed)
    del base
    columns = compared(alternate(steps, options.rounds, options.seconds, options.seed, options.device), "lora")
    for name, step in steps.items():
        columns[name] |= dict.fromkeys(("ns per weight", "counted bytes per weight", "GB/s of counted bytes"), "")
        columns[name]["peak bytes"] = peak_bytes(step, options.device)
    return [{"part": "step", "kind": kind, "m": "", "n": "", "tokens": tokens} | named(columns, name) for name in steps]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with tiny sizes; writes no file")
    parser.add_argument("--part", nargs="+", choices=["kernel", "step"], default=["kernel", "step"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096], help="per step")
    parser.add_argument("--model", default="llama4", help="llama4 (default), smollm2, or what from_pretrained takes")
    parser.add_argument("--rounds", type=int, default=50, help="at most, for each row")
    parser.add_argument("--seconds", type=float, default=8, help="for each row, after which no round begins")
    parser.add_argument("--budget", type=float, default=9, help="minutes, after which nothing is begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds")
    parser.add_argument("--csv", type=Path, default=RESULTS / "gpu.csv")
    options = parser.parse_args(arguments)
    options.device, options.backend, options.shapes = torch.device("cuda"), "triton", SHAPES
    if options.dry_run:
        options.device, options.shapes, options.tokens, options.model = torch.device("cpu"), [(16, 128)], [8], "tiny"
        options.rounds, options.seconds = 1, 0.0
    elif not torch.cuda.is_available():
        parser.error("no GPU is available: run with --dry-run")
    if options.rounds < 6 and not options.dry_run:
        parser.error(f"--rounds must be >= 6 for a 95 % interval, got {options.rounds}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    table = None if options.dry_run else Table(options.csv, KEY, options.fresh)
    origin, budget = provenance(options.device, options.seed), Budget(options.budget)
    torch.backends.cuda.matmul.allow_tf32 = False
    work = [
        *((kernel_rows, (*shape, kind)) for shape in options.shapes for kind in KERNELS if "kernel" in options.part),
        *((step_rows, (kind, tokens)) for tokens in options.tokens for kind in STEPS if "step" in options.part),
    ]
    for measure_rows, case in work:
        if budget.spent():
            break
        rows = [row | origin for row in measure_rows(*case, options)]
        if table is not None:
            table.add([row for row in rows if not table.has(row)])
        show(rows)


def show(rows: list[dict]) -> None:
    first = rows[0]
    print(", ".join(f"{name} {first[name]}" for name in ("part", "kind", "m", "n", "tokens") if first[name] != ""))
    for row in rows:
        more = f"{row['ns per weight']} ns per weight" if row["part"] == "kernel" else f"peak {row['peak bytes']} bytes"
        print(f"  {row['contestant']:15s} {row['ratio']} [{row['ratio low']}, {row['ratio high']}]  {more}", flush=True)


if __name__ == "__main__":
    main()
