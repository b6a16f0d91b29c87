"""The Triton backend without a GPU: its values in Triton's interpreter, and its code for three GPUs."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from helpers import processes

pytest.importorskip("triton")
pytestmark = processes.patient
ROOT = Path(__file__).parents[2]

# An environment variable chooses the interpreter when triton is imported, so the test needs a process of its own.
INTERPRETED = """
import torch
from flatlora.ops import philox
from flatlora.ops.perturb import perturb_weight, row_noise
from helpers.noise_cases import DTYPES, STREAMS, assert_close, definition, key_of, nans, random_case

def check(weight, out, row_std, seed, sample, layer, first_row):
    perturb_weight(weight, row_std, key_of(seed, sample), layer, first_row, backend="triton", out=out)
    assert_close(out, definition(weight, row_std, seed, sample, layer, first_row))

for seed, sample, layer, first_row, m, n in STREAMS:
    weight, row_std = random_case(m, n, torch.float32)
    check(weight, nans(m, n, torch.float32), row_std, seed, sample, layer, first_row)
seed, sample, layer, first_row, m, n = STREAMS[-1]
for dtype in DTYPES:
    for out_dtype in DTYPES:
        weight, row_std = random_case(m, n, dtype)
        check(weight, nans(m, n, out_dtype), row_std, seed, sample, layer, first_row)
weight, row_std = random_case(m, n, torch.float32)
for out_dtype in (torch.float32, torch.bfloat16):
    check(weight.t().contiguous().t(), nans(n, m, out_dtype).t(), row_std, seed, sample, layer, first_row)
    check(torch.zeros(1).expand(m, n), nans(m, n, out_dtype), row_std, seed, sample, layer, first_row)
    a, b = m // 3, m // 2
    check(weight[a:b], nans(b - a, n, out_dtype), row_std[a:b], seed, sample, layer, first_row + a)

storage = torch.from_file(PATH, shared=True, size=2**31 + 70, dtype=torch.bfloat16)
far = storage.as_strided((2, 70), (2**31, 1))
far.copy_(random_case(2, 70, torch.bfloat16)[0])
check(far, nans(2, 70, torch.float32), torch.ones(2), 1, 2, 3, 4)

rows = torch.tensor([2**31 + 5, 0, 7, 7, 2**32 - 1])
row_std = torch.rand(5)
noise = [row_noise(rows, row_std, key_of(-9, 8), 7, 70, backend=b) for b in ("reference", "triton")]
assert_close(noise[1], noise[0])

from flatlora.ops import triton_kernel
import triton, triton.language as tl

@triton.jit
def words_kernel(out, k0, k1, row, layer, sample, N: tl.constexpr):
    block = tl.arange(0, N)
    zero = tl.zeros((N,), tl.uint32)
    w0, w1, w2, w3 = triton_kernel._philox(
        block.to(tl.uint32), zero + tl.load(row).to(tl.uint32), zero + tl.load(layer).to(tl.uint32),
        zero + tl.load(sample).to(tl.uint32), tl.load(k0).to(tl.uint32), tl.load(k1).to(tl.uint32))
    tl.store(out + block * 4, w0.to(tl.int64))
    tl.store(out + block * 4 + 1, w1.to(tl.int64))
    tl.store(out + block * 4 + 2, w2.to(tl.int64))
    tl.store(out + block * 4 + 3, w3.to(tl.int64))

for seed, sample, layer, first_row, m, n in STREAMS:
    out = torch.zeros(64, 4, dtype=torch.int64)
    values = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, first_row, layer, sample]
    words_kernel[(1,)](out, *(torch.tensor([v]) for v in values), N=64)
    assert torch.equal(out, philox.words(seed, sample, layer, torch.tensor([first_row]), 256)[0])
print("agrees")
"""


def run_python(script, **environment):
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment}
    done = processes.run_command([sys.executable, script], env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_interpreter_agrees_with_the_definition(tmp_path):
    script = tmp_path / "interpreted.py"  # triton reads the source of its kernels from a file
    script.write_text(INTERPRETED.replace("PATH", repr(str(tmp_path / "sparse"))))
    assert "agrees" in run_python(script, TRITON_INTERPRET="1")


COMPILED = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flatlora.ops import triton_kernel

tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
kernel = triton_kernel.perturb_kernel
records = []
CASES = [("bf16", "bf16", False), ("fp32", "bf16", False), ("fp32", "fp32", True), ("fp64", "fp64", False)]
for capability in (80, 90, 100):
    for weight, out, gather in CASES:
        constants = {"o1": 1, "w1": 1, "GATHER": gather, "ROWS": triton_kernel.ROWS}
        types = {"out": "*" + out, "weight": "*" + weight, "row_std": "*fp64" if weight == "fp64" else "*fp32",
                 "key": "*i64", "index": "*i64"}
        signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
        aligned = {"out", "weight", "row_std", "key", "index", "n", "o0", "w0"}  # what a launch finds for most layers
        attributes = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in aligned}
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": triton_kernel.WARPS})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        records.append({
            "target": f"sm_{capability}", "weight": weight, "out": out, "gather": gather,
            **{name.lower(): int(re.search(name + r":(\\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")},
            "vector": bool(re.search(r"st\\.global\\.v\\d", compiled.asm["ptx"])),
        })
print(json.dumps(records))
"""


@pytest.mark.slow
def test_compiles_for_gpus_without_spills(tmp_path, record_property):
    """Registers spilled would be in local memory, on the stack."""
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    # The kernel wants fusion; triton 3.9 has to be told
    output = run_python(script, TRITON_CACHE_DIR=str(tmp_path / "cache"), TRITON_DEFAULT_FP_FUSION="1")
    records = json.loads(re.search(r"\[\{.*\}\]", output)[0])
    record_property("kernels", records)
    assert {r["target"] for r in records} == {"sm_80", "sm_90", "sm_100"}
    for record in records:
        assert record["stack"] == record["local"] == 0, record
        assert record["reg"] <= 96, record
        assert record["vector"], record


DEFAULT_DTYPES = """
import torch
from helpers.noise_cases import DEFAULTS, problem
from flatlora.ops import perturb_weight, row_noise

for dtype in (torch.float32, torch.bfloat16, torch.float64):
    results = []
    for default in (torch.float32, *DEFAULTS):
        torch.set_default_dtype(default)
        weight, _, _, _, std, key = problem(dtype, m=33)
        rows = torch.tensor([3, 0], dtype=torch.int64)
        results += [(perturb_weight(weight, std, key, 3, backend="triton", relative=0.3),
                     row_noise(rows, std[:2], key, 3, 70, backend="triton"))]
    for a, b in results[1:]:
        assert a.dtype == dtype and torch.equal(a, results[0][0]) and torch.equal(b, results[0][1]), default
print("same bits")
"""


@pytest.mark.slow
def test_the_default_dtype_changes_no_bit(tmp_path):
    script = tmp_path / "default_dtypes.py"
    script.write_text(DEFAULT_DTYPES)
    assert "same bits" in run_python(script, TRITON_INTERPRET="1")
