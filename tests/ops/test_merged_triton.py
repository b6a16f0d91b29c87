"""The Triton kernels without a GPU: row norms and W + eps in Triton's interpreter, and code for three GPUs."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import processes

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CASES = [
    "norms_and_noise", "agrees_with_the_formula", "squares_out_of_range", "first_columns", "four_bits",
    "values_in_device_memory", "block_sizes", "a_model_without_the_host", "replays_in_a_model",
]  # fmt: skip


def run_module(module, *arguments, **environment):
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment}
    done = processes.run_command([sys.executable, "-m", f"helpers.{module}", *arguments], env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@processes.patient
@pytest.mark.parametrize("case", CASES)
def test_in_the_interpreter(case):
    assert "agrees" in run_module("triton_cases", case)


@pytest.mark.slow
@processes.patient
@pytest.mark.parametrize("which", [["few"], pytest.param([], marks=pytest.mark.thorough)], ids=["few", "all"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_for_gpus_without_spills(capability, which, tmp_path, record_property):
    """Registers spilled would be in local memory, on the stack."""
    output = run_module("triton_compiled", str(capability), *which, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    record_property("kernels", records)
    assert {r["kernel"] for r in records} == {"perturb_kernel", "merged_kernel"}
    for record in records:
        assert record["stack"] == record["local"] == 0, record
        # two programs of eight warps fit into the registers of a multiprocessor, three of four warps
        assert record["reg"] <= (96 if record["kernel"] == "perturb_kernel" else 128 if "rank" not in record else 255)
        assert record["shared"] <= 99 * 1024, record  # of the GPUs that have the least
        # bytes are loaded one by one, and a tile of fp64 has more than a vector
        assert record["vector"] or record["case"][3:] == [16, 2, 4], record


class Timer:
    """Stands for the clock: each block size takes as long as it has rows."""

    def __init__(self):
        self.runs = []

    def __call__(self, run):
        run()
        return float(self.runs[-1].rows)


def test_the_fastest_block_size_is_chosen_once(monkeypatch):
    from flatlora.ops import triton_tuning

    monkeypatch.setattr(triton_tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    timer, device = Timer(), torch.device("cuda", 0)

    def choose(weights, problem="a", device=device):
        return triton_tuning.choose(triton_tuning.NOISE, problem, weights, device, timer.runs.append, timer)

    least = min(triton_tuning.NOISE, key=lambda size: size.rows)
    assert choose(triton_tuning.TUNED_FROM - 1) == triton_tuning.NOISE[0] and timer.runs == []
    assert choose(triton_tuning.TUNED_FROM, device=torch.device("cpu")) == triton_tuning.NOISE[0]
    assert choose(triton_tuning.TUNED_FROM) == choose(triton_tuning.TUNED_FROM) == least
    assert timer.runs == list(triton_tuning.NOISE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(triton_tuning.TUNED_FROM, "b") == triton_tuning.NOISE[0]  # nothing can be timed in a capture
    assert timer.runs == list(triton_tuning.NOISE)
