"""The noise of the Triton backend without a GPU: its values in Triton's interpreter."""

import os
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

from flatlora.ops import triton_device
import triton, triton.language as tl

@triton.jit
def words_kernel(out, k0, k1, row, layer, sample, N: tl.constexpr):
    block = tl.arange(0, N)
    zero = tl.zeros((N,), tl.uint32)
    w0, w1, w2, w3 = triton_device.philox(
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
