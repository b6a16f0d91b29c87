"""The choice of the backend, what each one refuses, threads and forks."""

import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import processes
from helpers.noise_cases import key_of, random_case

from flatlora.ops import native, perturb
from flatlora.ops.perturb import perturb_weight, resolve_backend, row_noise

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
needs_c = pytest.mark.skipif(native.LIBRARY is None, reason="the C kernel was not built")


@pytest.fixture
def fresh_choice():
    perturb._auto.cache_clear()
    yield
    perturb._auto.cache_clear()


@needs_c
def test_auto_on_the_cpu(fresh_choice, caplog):
    assert resolve_backend("auto", CPU) == "c"
    assert not caplog.records


def test_auto_without_the_kernel_says_so_once(fresh_choice, monkeypatch, caplog):
    monkeypatch.setattr(native, "LIBRARY", None)
    weight, row_std = random_case(3, 4, torch.float32)
    with caplog.at_level(logging.WARNING):
        results = [perturb_weight(weight, row_std, key_of(1, 2), 0) for _ in range(3)]
    assert torch.equal(results[0], perturb_weight(weight, row_std, key_of(1, 2), 0, backend="torch"))
    assert len(caplog.records) == 1 and "C kernel" in caplog.text


@pytest.mark.parametrize("installed, expected", [(True, "triton"), (False, "torch")])
def test_auto_on_a_gpu_stays_on_the_gpu(fresh_choice, monkeypatch, installed, expected):
    monkeypatch.setattr(perturb, "_has_triton", lambda: installed)
    assert resolve_backend("auto", CUDA) == expected


def test_explicit_choices_never_fall_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="one of .*'c'.*got 'cuda'"):
        resolve_backend("cuda", CPU)
    with pytest.raises(ValueError, match="'triton' serves CUDA .*cpu.*backend='auto'"):
        resolve_backend("triton", CPU)
    with pytest.raises(ValueError, match="'c' serves CPU .*cuda:0"):
        resolve_backend("c", CUDA)
    monkeypatch.setattr(perturb, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="needs the triton package"):
        resolve_backend("triton", CUDA)
    monkeypatch.setattr(native, "LIBRARY", None)
    with pytest.raises(ValueError, match="'c' needs the C kernel.*install a C compiler"):
        row_noise(torch.tensor([0]), torch.ones(1), key_of(0, 0), 0, 4, backend="c")


def test_wrong_operands():
    weight, row_std = random_case(3, 4, torch.float32)
    with pytest.raises(ValueError, match=r"out must be of shape \(3, 4\).*got \(4, 3\)"):
        perturb_weight(weight, row_std, key_of(0, 0), 0, out=torch.empty(4, 3))
    with pytest.raises(ValueError, match="out must be .*float16.*got .*float32"):
        perturb_weight(weight, row_std, key_of(0, 0), 0, dtype=torch.float16, out=torch.empty(3, 4))


@needs_c
def test_c_refuses_unknown_dtypes():
    with pytest.raises(TypeError, match="weight must be a floating-point matrix, got torch.int32"):
        perturb_weight(torch.ones(2, 2, dtype=torch.int32), torch.ones(2), key_of(0, 0), 0, backend="c")
    with pytest.raises(TypeError, match="weight must be of one of .*got torch.float8_e5m2"):
        perturb_weight(torch.ones(2, 2).to(torch.float8_e5m2), torch.ones(2), key_of(0, 0), 0, backend="c")


@needs_c
@pytest.mark.parametrize("m, n", [(2, 300_000), (1025, 1111), (100_000, 3)])
def test_any_number_of_threads_gives_the_same_bits(m, n):
    weight, row_std = random_case(m, n, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7, 300):
            torch.set_num_threads(count)
            results += [perturb_weight(weight, row_std, key_of(1, 2), 3, backend="c")]
            results += [perturb_weight(weight.t().contiguous().t(), row_std, key_of(1, 2), 3, backend="c")]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


FORK = """
import os, torch
from torch.utils.data import DataLoader, Dataset
from flatlora.ops.perturb import perturb_weight

weight, row_std, key = torch.zeros(1000, 1000), torch.ones(1000), torch.tensor([1, 2])

class Noisy(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        torch.set_num_threads(2)  # a worker of a DataLoader has one thread; two threads could hang
        noisy = perturb_weight(weight, row_std, key, index, backend="c")
        torch.set_num_threads(1)
        return noisy

torch.set_num_threads(2)
weight @ weight  # starts torch's thread pool
expected = [perturb_weight(weight, row_std, key, layer, backend="c") for layer in range(4)]
child = os.fork()
if child == 0:
    noisy = perturb_weight(weight, row_std, key, 0, backend="c")
    os._exit(noisy.numpy().tobytes() != expected[0].numpy().tobytes())  # torch.equal would hang
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
for batch in DataLoader(Noisy(), batch_size=4, num_workers=2, multiprocessing_context="fork"):
    assert torch.equal(batch, torch.stack(expected))
assert torch.equal(perturb_weight(weight, row_std, key, 0, backend="c"), expected[0])
print("same in every process")
"""


@pytest.mark.slow
@needs_c
@processes.patient
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_processes_do_not_hang():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = processes.run_command([sys.executable, "-c", FORK], env=environment)
    assert "same in every process" in done.stdout, done.stderr
