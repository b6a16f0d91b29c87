import platform
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import instructions

from flatlora.ops import native

torch = instructions.torch
LANES = {"avx2": 4, "avx512": 8, "avx512bf16": 8}.get(native.KERNELS[native.BEST])  # products of 32 bits in one
counted = pytest.mark.skipif(
    LANES is None or platform.machine() != "x86_64" or not shutil.which("objdump"),
    reason="needs AVX2 or newer, and objdump of binutils",
)


@counted
@pytest.mark.parametrize("m, n, blocks", [(2, 256, 64), (3, 192, 48), (1, 576, 144), (1, 100, 32)])
def test_philox_takes_twenty_products_for_four_numbers(m, n, blocks, monkeypatch):
    # Ten rounds of two products. Two of the twenty have operands that are the same for all blocks, so a compiler may
    # compute them once. The end of a row takes half a span of 32 blocks if this is enough.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    names = instructions.disassembled(native.LIBRARY._name)
    found = instructions.executed(instructions.noise(torch.bfloat16, m, n, None))
    products = sum(times for address, times in found.items() if names[address].startswith("vpmuludq"))
    assert 18 * m * blocks / LANES < products <= 20 * m * blocks / LANES


@counted
def test_counts_grow_with_rows_and_with_the_rank():
    one, two = (instructions.count(instructions.noise(torch.float32, m, 256, None)) for m in (4, 8))
    vectors = [instructions.count(instructions.noise(torch.float32, 4, 256, r))[0] for r in (2, 4)]
    assert one[0] < vectors[0] < vectors[1] and one[0] < one[1]
    # each rank adds one product and sum for each of the weights of a vector
    assert vectors[1] - vectors[0] == 2 * 4 * 256 / (2 * LANES)
    assert two[0] == pytest.approx(2 * one[0], rel=0.05)


@counted
def test_a_failure_of_the_traced_call_is_reported():
    with pytest.raises(RuntimeError, match="failed"):
        instructions.executed(lambda: instructions.os._exit(3))


@pytest.mark.parametrize(
    "instruction, is_vector",
    [
        ("vpmuludq %zmm1,%zmm2,%zmm3", True), ("vsqrtps %zmm0,%zmm0", True), ("kortestw %k0,%k0", True),
        ("vmovdqu64 (%rax),%zmm0", False), ("vbroadcastss (%rax),%zmm1", False), ("add $0x1,%rax", False),
        ("prefetcht0 0x400(%rax)", False),
    ],
)  # fmt: skip
def test_which_instructions_are_of_vectors(instruction, is_vector):
    assert instructions.is_vector(instruction) is is_vector


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_clock_is_that_of_a_processor():
    assert 5e8 < instructions.clock() < 7e9


def test_results_follow_from_their_counts():
    rows = instructions.read(instructions.RESULTS / "instructions.csv")
    assert rows
    for row in rows:
        at_once = instructions.AT_ONCE[row["kernel"]]
        bound = float(row["vector instructions"]) / at_once / float(row["GHz"])
        assert float(row["bound ns"]) == pytest.approx(bound, abs=2e-3)
        assert float(row["measured ns"]) > 0.9 * bound  # the clock changes a little between the two
        assert re.fullmatch(r"python examples/benchmarks/instructions.py.*", row["command"])
