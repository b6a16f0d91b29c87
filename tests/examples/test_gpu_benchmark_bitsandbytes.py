"""The GPU benchmark without a GPU: its dry run goes through all parts, and writes no file."""

import os
import sys
from pathlib import Path

import pytest
from helpers import processes

pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")
ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"


@pytest.mark.slow
@processes.patient
def test_dry_run():
    before = sorted((BENCHMARKS / "results").iterdir())
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = processes.run_command([sys.executable, BENCHMARKS / "gpu.py", "--dry-run"], env=variables)
    assert done.returncode == 0, done.stderr
    for kind in ("bf16", "fp32", "fp32 to bf16", "nf4", "nf4 double"):
        assert f"part kernel, kind {kind}, m 16, n 128\n" in done.stdout
    for kind in ("bf16", "fp32", "4 bits", "dropout", "DoRA", "checkpointing", "graph"):
        assert f"part step, kind {kind}, tokens 8\n" in done.stdout
    assert sorted((BENCHMARKS / "results").iterdir()) == before
