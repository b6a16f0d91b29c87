"""Compile the Triton kernels ahead of time; a JSON line for each.

python -m helpers.triton_compiled CAPABILITY [few]
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the kernels want fusion; triton 3.9 has to be told

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flatlora.ops.triton_kernel import RANKS, merged_kernel, perturb_kernel
from flatlora.ops.triton_tuning import MERGED, NOISE, register_limit

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROUND = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
COMMON = {
    "codes": "*fp32", "outer_codes": "*fp32", "outer_scales": "*fp32", "offset": "*fp32", "norms": "*fp32",
    "relative": "fp32", "scaling": "fp32", "strength": "*fp32", "key": "*i64", "index": "*i64",
}  # fmt: skip
# stored as, dtype of W, dtype of W + eps
NOISE_CASES = [
    ("dense", "bf16", "bf16"), ("dense", "fp16", "fp16"), ("dense", "fp32", "bf16"), ("dense", "fp32", "fp32"),
    ("dense", "fp64", "fp64"), ("4 bits", "bf16", "bf16"), ("double", "bf16", "bf16"), ("double", "fp16", "fp16"),
]  # fmt: skip
MERGED_CASES = [case for case in NOISE_CASES if case[1] != "fp64"]


def specification(kernel, stored, weight, out, size, rank, gather):
    """Signature, constants and hints: those that a launch finds for most layers."""
    constants = {
        "o1": 1, "w1": 1, "ROWS": size.rows, "TILES": size.tiles, "STRENGTH": True, "SIZE": 6, "OUTER": -1,
        "PAIRED": True, "ROUND": ROUND.get(weight, tl.float32),
    }  # fmt: skip
    if stored == "dense":
        constants |= {"SIZE": -1, "PAIRED": False, "ROUND": tl.float32}
    elif stored == "double":
        constants["OUTER"] = 8
    if kernel is perturb_kernel:
        constants["GATHER"] = gather
    else:
        constants |= {"RANKS": min(max(16, triton.next_power_of_2(rank)), RANKS), "CHUNKED": rank > RANKS}
    types = COMMON | {
        "out": f"*{out}", "weight": f"*{weight}" if stored == "dense" else "*u8",
        "scales": "*u8" if stored == "double" else "*fp32", "A": "*fp32", "B": "*fp32",
        "row_std": "*fp64" if weight == "fp64" else "*fp32",
    }  # fmt: skip
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {name for name in names if signature[name].startswith("*")} | {"n", "o0", "w0", "a0", "shift"}
    hints = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if name in aligned}
    return signature, constants, hints


def compiled(kernel, capability, stored, weight, out, size, rank=8, gather=False):
    """The kernel for this architecture."""
    source = ASTSource(kernel, *specification(kernel, stored, weight, out, size, rank, gather))
    options = {"num_warps": size.warps} | register_limit(stored != "dense", min(rank, RANKS))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def run_tool(name, option, cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, option, file.name], capture_output=True, text=True, check=True).stdout


def record(kernel, capability, *case, **options):
    """What the compiled kernel uses. Registers that are spilled are in local memory, on the stack."""
    binary = compiled(kernel, capability, *case, **options)
    usage = run_tool("cuobjdump", "-res-usage", binary.asm["cubin"])
    return {
        "kernel": kernel.fn.__name__, "target": f"sm_{capability}", "case": [*case[:3], *case[3]], **options,
        **{name.lower(): int(re.search(name + r":(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")},
        "shared": binary.metadata.shared, "vector": bool(re.search(r"st\.global\S*\.v\d", binary.asm["ptx"])),
    }  # fmt: skip


def main(capability, few=False):
    cases = [(perturb_kernel, *case, NOISE[0], {}) for case in NOISE_CASES]
    cases += [(merged_kernel, *case, MERGED[0], {}) for case in MERGED_CASES]
    cases += [(perturb_kernel, *NOISE_CASES[0], size, {}) for size in NOISE[1:]]
    cases += [(merged_kernel, *MERGED_CASES[-1], size, {}) for size in MERGED[1:]]
    cases.append((perturb_kernel, *NOISE_CASES[3], NOISE[0], {"gather": True}))
    cases += [(merged_kernel, *MERGED_CASES[0], MERGED[0], {"rank": rank}) for rank in (32, 128)]
    if few:
        kernels = ((perturb_kernel, NOISE[0]), (merged_kernel, MERGED[0]))
        cases = [(kernel, *NOISE_CASES[k], size, {}) for kernel, size in kernels for k in (0, 6)]
    for kernel, *case, options in cases:
        print(json.dumps(record(kernel, capability, *case, **options)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), "few" in sys.argv[2:])
