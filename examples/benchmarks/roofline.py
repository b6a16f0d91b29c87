"""What the noise should cost on large GPUs: COMPUTED from counted bytes and instructions, nothing here was measured.

    python examples/benchmarks/roofline.py              # writes results/roofline.csv, prints the tables
    python examples/benchmarks/roofline.py --count      # counts the instructions again (needs triton, on Linux)

W -> W + eps is one kernel (flatlora/ops/triton_kernel.py): `merged` in forward, which first computes the row norms of
W + s B A (rank up to 16) and reads W again from the L2 cache, and `perturb` in backward. The time per weight of each is
the longest of

    memory     (bytes of W + bytes of W + eps) / bandwidth; with `merged` also 2 W + W + eps + A / 16 rows / L2's
    issue      instructions / (4 warps of 32 lanes per cycle and multiprocessor)
    integer    logic, shifts, integer sums, comparisons, selections / their lanes
    product    float instructions and integer products / the float lanes; a wide product counts twice
    special    square roots (before sm_90 conversions too) / 16 lanes

The products of the row norms are on the tensor cores and are not counted. The products of the frozen layer in forward and backward are 4 x tokens floating point
operations per weight. Their ratio is the expected cost over LoRA's linear layers alone; attention, LoRA's own products,
the output layer and the optimizer make the step longer, and the ratio smaller. `tokens` are those of one forward.

Two readings: with the products at the limit of the tensor cores, which no real step reaches, and at half of it; the
noise is at its own limit in both. For the add-and-remove scheme the bytes alone are counted: z written, W and z read,
W written, all twice.
"""

import argparse
import collections
import os
import re
import subprocess
import tempfile
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
# Instructions per weight in the machine code of the kernel (triton 3.9, 2,048 weights in 128 threads): --count
COUNTS = {
    90: {"wide product": 4.56, "product": 1.38, "float": 13.62, "special": 0.69, "integer": 22.75, "other": 3.44},
    80: {"wide product": 4.56, "product": 2.25, "float": 13.56, "special": 2.69, "integer": 20.44, "other": 4.19},
}
BYTES = {"bf16": (2, 2), "fp32 to bf16": (4, 2), "fp32": (4, 4)}  # of W, of W + eps
TOKENS = [512, 1024, 2048, 4096, 8192, 16384, 32768]
CLASSES = [  # the first that matches
    ("wide product", r"IMAD\.WIDE|IMAD\.HI"),
    ("product", r"IMAD"),
    ("float", r"FFMA|FMUL|FADD|HFMA2"),
    ("special", r"MUFU|I2F(?!P)|F2I"),
    ("integer", r"LOP3|V?IADD|LEA|SHF|I2FP|F2F|F?SEL|[IF]SETP|PRMT|IABS|SGXT|PLOP|MOV"),
    ("other", r"(?!NOP)"),
]


def limits(gpu: Gpu, kind: str) -> dict[str, float]:
    """Picoseconds per weight that each resource needs."""
    n, rate = COUNTS[gpu.capability], gpu.processors * gpu.clock
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
    norms = BYTES[kind][0] / gpu.bandwidth
    cast = sum(BYTES[kind]) / gpu.bandwidth if kind == "fp32 to bf16" else 0  # plain LoRA's own, in forward: spared
    return (2e-12 * max(limits(gpu, kind).values()) + norms - cast) / products(gpu, kind, tokens, utilisation)


def products(gpu: Gpu, kind: str, tokens: int, utilisation: float) -> float:
    """Seconds per weight of the products in forward and backward. Those of fp32 run as TF32, at half the rate."""
    return 4 * tokens / (utilisation * gpu.tensor / (2 if kind == "fp32" else 1))


def add_and_remove(gpu: Gpu, kind: str, tokens: int, utilisation: float) -> float:
    """The same of the add-and-remove scheme, by its bytes alone; its products cast W where plain LoRA's do."""
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
                    "overhead, products at limit": f"{overhead(gpu, kind, tokens, 1.0):.4f}",
                    "overhead, products at half": f"{overhead(gpu, kind, tokens, 0.5):.4f}",
                    "add and remove, products at half": f"{add_and_remove(gpu, kind, tokens, 0.5):.4f}",
                    "source": "computed, not measured",
                })  # fmt: skip
    return table


def count(capability: int) -> dict[str, float]:
    """Instructions per weight of each class in the kernel's machine code, for a bf16 weight and a bf16 result."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flatlora.ops import triton_kernel

    kernel = triton_kernel.perturb_kernel
    constants = {"o1": 1, "w1": 1, "GATHER": False, "ROWS": triton_kernel.ROWS}
    types = {"out": "*bf16", "weight": "*bf16", "row_std": "*fp32", "key": "*i64", "index": "*i64"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {*types, "n", "o0", "w0"}
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, hints),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": triton_kernel.WARPS},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout
    per_thread = triton_kernel.ROWS * triton_kernel.TILE.value / (32 * triton_kernel.WARPS)
    return {name: found / per_thread for name, found in classify(text).items()}


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
        for gpu in GPUS:
            counts = {name: round(n, 2) for name, n in count(gpu.capability).items()}
            print(f"{gpu.capability}: {counts},")
        return
    table = rows()
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    tables.write_csv(options.csv, table)
    print("Computed, not measured. ps per weight of W -> W + eps, what bounds it, and the expected cost over the")
    print("products of the frozen layers (at the limit of the tensor cores, at half of it):")
    for row in table:
        print(
            f"{row['gpu']:15s} {row['dtype']:12s} {row['tokens']:6d} tokens  {row['W + eps ps']} ps ({row['bound']})  "
            f"{100 * float(row['overhead, products at limit']):5.1f} %  "
            f"{100 * float(row['overhead, products at half']):5.1f} %"
        )


if __name__ == "__main__":
    main()
