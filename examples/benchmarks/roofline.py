"""What the noise should cost on large GPUs: COMPUTED from counted bytes and instructions, nothing here was measured.

    python examples/benchmarks/roofline.py              # writes results/roofline.csv, prints the tables
    python examples/benchmarks/roofline.py --count      # counts the instructions again (needs triton, on Linux)

W -> W + eps is one kernel (flatlora/ops/triton_kernel.py): in forward `merged`, which first computes the row norms of
W + s B A (rank up to 16) and then reads W again from the L2 cache, and in backward `perturb`. The time per weight is
the longest of

    memory     (bytes of W + bytes of W + eps) / bandwidth
    issue      instructions / (4 warps of 32 lanes per cycle and multiprocessor)
    integer    logic, shifts, integer sums, comparisons, selections / their lanes
    product    float instructions and integer products / the float lanes; a wide product counts twice
    special    square roots (before sm_90 conversions too) / 16 lanes

The products of the row norms are on the tensor cores, of which they need little. The products of the frozen layer in
forward and backward are 4 x tokens floating point operations per weight. Their ratio is the expected cost over LoRA's
linear layers alone; attention, LoRA's own products, the output layer and the optimizer make the step longer, and the
ratio smaller. `tokens` are those of one forward. What plain LoRA does and the kernels make unnecessary is subtracted:
under autocast the cast of W in forward, with 4 bits the dequantization in forward and backward.

Two readings: with the products at the limit of the tensor cores, which no real step reaches, and at half of it; the
noise is at its own limit in both. For the add-and-remove scheme the bytes alone are counted: z written, W and z read,
W written, all twice.
"""

import argparse
import collections
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from measure import RESULTS, tables


@dataclass(frozen=True)
class Gpu:
    """Limits of a GPU: its data sheet, and the throughput table of NVIDIA's CUDA programming guide."""

    name: str
    capability: int
    bandwidth: float  # bytes / s
    tensor: float  # bf16 operations / s, dense
    processors: int
    clock: float  # cycles / s, at which `tensor` is stated
    float_lanes: int  # per multiprocessor
    integer_lanes: int = 64
    special_lanes: int = 16
    issue_lanes: int = 128


GPUS = [
    Gpu("H100 SXM", 90, 3.35e12, 989.4e12, 132, 1.83e9, 128),
    Gpu("A100 SXM 80 GB", 80, 2.039e12, 312e12, 108, 1.41e9, 64),
]
# Instructions per weight in the machine code of the kernels for bf16 (triton 3.9), by capability, kernel and how W is
# stored, 4 bits with double quantization: --count
COUNTS = {
    (90, "perturb", "dense"): {
        "wide product": 4.94,
        "product": 1.06,
        "float": 14.12,
        "special": 0.69,
        "integer": 21.81,
        "other": 5.81,
    },
    (90, "perturb", "4 bits"): {
        "wide product": 4.88,
        "product": 3.12,
        "float": 15.5,
        "special": 0.69,
        "integer": 37.81,
        "other": 9.06,
    },
    (90, "merged", "dense"): {
        "wide product": 4.69,
        "product": 2.62,
        "float": 15.5,
        "special": 0.5,
        "integer": 29.25,
        "other": 8.38,
    },
    (90, "merged", "4 bits"): {
        "wide product": 4.94,
        "product": 3.75,
        "float": 18.5,
        "special": 0.5,
        "integer": 56.88,
        "other": 14.81,
    },
    (80, "perturb", "dense"): {
        "wide product": 4.94,
        "product": 2.06,
        "float": 14.25,
        "special": 2.69,
        "integer": 20.94,
        "other": 4.19,
    },
    (80, "perturb", "4 bits"): {
        "wide product": 4.88,
        "product": 3.94,
        "float": 15.5,
        "special": 2.69,
        "integer": 35.62,
        "other": 8.69,
    },
    (80, "merged", "dense"): {
        "wide product": 4.69,
        "product": 2.62,
        "float": 15.5,
        "special": 2.5,
        "integer": 27.38,
        "other": 8.81,
    },
    (80, "merged", "4 bits"): {
        "wide product": 4.94,
        "product": 4.25,
        "float": 18.5,
        "special": 2.5,
        "integer": 54.94,
        "other": 15.69,
    },
}
BYTES = {  # of W, of W + eps
    "bf16": (2, 2), "fp32 to bf16": (4, 2), "fp32": (4, 4),
    "nf4": (0.5 + 4 / 64, 2), "nf4 double": (0.5 + 1 / 64 + 4 / (64 * 256), 2),
}  # fmt: skip
TOKENS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
CLASSES = [  # the first that matches
    ("wide product", r"IMAD\.WIDE|IMAD\.HI"),
    ("product", r"IMAD"),
    ("float", r"FFMA|FMUL|FADD|HFMA2"),
    ("special", r"MUFU|I2F(?!P)|F2I"),
    ("integer", r"LOP3|V?IADD|LEA|SHF|I2FP|F2F|F?SEL|[IF]SETP|PRMT|IABS|SGXT|PLOP|MOV"),
    ("other", r"(?!NOP)"),
]


def limits(gpu: Gpu, kind: str, kernel: str = "perturb") -> dict[str, float]:
    """Picoseconds per weight that each resource needs."""
    stored = "4 bits" if kind.startswith("nf4") else "dense"
    n, rate = COUNTS[gpu.capability, kernel, stored], gpu.processors * gpu.clock
    times = {
        "memory": sum(BYTES[kind]) / gpu.bandwidth,
        "issue": sum(n.values()) / (gpu.issue_lanes * rate),
        "integer": n["integer"] / (gpu.integer_lanes * rate),
        "product": (n["float"] + n["product"] + 2 * n["wide product"]) / (gpu.float_lanes * rate),
        "special": n["special"] / (gpu.special_lanes * rate),
    }
    return {name: 1e12 * seconds for name, seconds in times.items()}


def overhead(gpu: Gpu, kind: str, tokens: int, utilisation: float) -> float:
    """Cost of the noise over the frozen layers' products, as a fraction."""
    noise = 1e-12 * sum(max(limits(gpu, kind, kernel).values()) for kernel in ("merged", "perturb"))
    passes = {"fp32 to bf16": 1, "nf4": 2, "nf4 double": 2}.get(kind, 0)  # of plain LoRA over W, spared
    spared = passes * sum(BYTES[kind]) / gpu.bandwidth
    return (noise - spared) / products(gpu, kind, tokens, utilisation)


def products(gpu: Gpu, kind: str, tokens: int, utilisation: float) -> float:
    """Seconds per weight of the products in forward and backward. Those of fp32 run as TF32, at half the rate."""
    return 4 * tokens / (utilisation * gpu.tensor / (2 if kind == "fp32" else 1))


def add_and_remove(gpu: Gpu, kind: str, tokens: int, utilisation: float) -> float:
    """The same of the add-and-remove scheme, by its bytes alone; its products cast W where plain LoRA's do.

    NaN with 4 bits, where it cannot be done.
    """
    if kind.startswith("nf4"):
        return float("nan")
    size = BYTES[kind][0]
    return (2 * 4 * size + size) / gpu.bandwidth / products(gpu, kind, tokens, utilisation)


def rows() -> list[dict]:
    """The whole table."""
    table = []
    for gpu in GPUS:
        for kind in BYTES:
            need = limits(gpu, kind)
            for tokens in TOKENS:
                table.append({
                    "gpu": gpu.name, "dtype": kind, "tokens": tokens,
                    **{f"{name} ps": f"{value:.3f}" for name, value in need.items()},
                    "bound": max(need, key=need.get), "W + eps ps": f"{max(need.values()):.3f}",
                    "with norms ps": f"{max(limits(gpu, kind, 'merged').values()):.3f}",
                    "bytes": f"{sum(BYTES[kind]):.4f}",
                    "overhead, products at limit": f"{overhead(gpu, kind, tokens, 1.0):.4f}",
                    "overhead, products at half": f"{overhead(gpu, kind, tokens, 0.5):.4f}",
                    "add and remove, products at half": f"{add_and_remove(gpu, kind, tokens, 0.5):.4f}",
                    "source": "computed, not measured",
                })  # fmt: skip
    return table


def count(capability: int, kernel: str, stored: str) -> dict[str, float]:
    """Instructions per weight of each class in the kernel's machine code, for a bf16 weight and a bf16 result."""
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    from helpers import triton_compiled

    from flatlora.ops import triton_kernel

    function = {"perturb": triton_kernel.perturb_kernel, "merged": triton_kernel.merged_kernel}[kernel]
    size = (triton_kernel.NOISE if kernel == "perturb" else triton_kernel.MERGED)[0]
    case = ("double" if stored == "4 bits" else "dense", "bf16", "bf16", size)
    binary = triton_compiled.compiled(function, capability, *case)
    text = triton_compiled.run_tool("nvdisasm", "-c", binary.asm["cubin"])
    threads = 32 * size.warps
    noise, norms = size.rows * size.tiles * 64 / threads, size.rows * 128 / threads  # weights of a thread in a round
    if kernel == "perturb":
        return {name: found / noise for name, found in classify(text).items()}
    # the loop over columns for the norms, the same for rows out of range (rare), and the loop over groups of tiles
    first, _, last = (classify(body) for body in loops(text) if sum(classify(body).values()) > 20)
    return {name: first[name] / norms + last[name] / noise for name in first}


def loops(text: str) -> list[str]:
    """The bodies of the innermost loops of a disassembly, in their order."""
    labels: dict[str, int] = {}
    found, lines = [], text.splitlines()
    for k, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = k
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if branch and branch[1] in labels:
            found.append((labels[branch[1]], k))
    inner = [(a, b) for a, b in found if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in found)]
    return ["\n".join(lines[a : b + 1]) for a, b in inner]


def classify(text: str) -> collections.Counter:
    """How many instructions of each class a disassembly has."""
    found = collections.Counter({name: 0 for name, _ in CLASSES})
    for operation in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE):
        name = next((name for name, pattern in CLASSES if re.match(pattern, operation)), None)
        if name is not None:
            found[name] += 1
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count the instructions in the kernel's machine code")
    parser.add_argument("--csv", type=Path, default=RESULTS / "roofline.csv")
    options = parser.parse_args(arguments)
    if options.count:
        for kernel in COUNTS:
            counts = {name: round(n, 2) for name, n in count(*kernel).items()}
            print(f"{kernel}: {counts},")
        return
    table = rows()
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    tables.write_csv(options.csv, table)
    print("Computed, not measured. ps per weight of W -> W + eps, what bounds it, and the expected cost over the")
    print("products of the frozen layers (at the limit of the tensor cores, at half of it):")
    for row in table:
        print(
            f"{row['gpu']:15s} {row['dtype']:12s} {row['tokens']:6d} tokens  {row['W + eps ps']} ps ({row['bound']}), "
            f"with norms {row['with norms ps']} ps  "
            f"{100 * float(row['overhead, products at limit']):5.1f} %  "
            f"{100 * float(row['overhead, products at half']):5.1f} %"
        )


if __name__ == "__main__":
    main()
