"""Row norms of the merged weight against the merged weight itself, and blocks that cover every row once."""

import pytest
import torch

from flatlora.ops import merged_row_norms, native, squared_row_norms
from flatlora.ops.blocks import BLOCK_BYTES, row_blocks, scratch

SHAPES = [(5, 7, 1), (6, 16, 2), (33, 65, 8), (64, 576, 8), (7, 100, 13), (9, 48, 64), (1, 1, 1)]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# float32 sums of n products; in half precisions torch's own path rounds A and the cross term
TOLERANCE = {"fp64": 1e-13, "fp32": 3e-6, "bf16": 1e-2, "fp16": 2e-3}


def problem(shape, dtype):
    m, n, r = shape
    weight = torch.randn(m, n).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return weight, torch.randn(m, r, dtype=wide), torch.randn(r, n, dtype=wide)


def by_definition(weight, B, A, scaling):
    return (weight.double() + scaling * B.double() @ A.double()).norm(dim=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_norms_are_those_of_the_merged_weight(shape, name, transposed):
    weight, B, A = problem(shape, DTYPES[name])
    weight = weight.T.contiguous().T if transposed else weight
    got = merged_row_norms(weight, squared_row_norms(weight), B, A, 0.7)
    expected = by_definition(weight, B, A, 0.7)
    assert got.dtype == (torch.float64 if name == "fp64" else torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[name], atol=TOLERANCE[name])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", range(native.BEST + 1))
def test_every_kernel_accumulates_in_float32(shape, name, kernel):
    weight, B, A = problem(shape, DTYPES[name])
    got = native.merged_row_norms(weight, B, A, 0.7, kernel=kernel)
    torch.testing.assert_close(got.double(), by_definition(weight, B, A, 0.7), rtol=3e-6, atol=3e-6)


def test_a_vanishing_row_is_not_nan():
    A, B = torch.randn(3, 50), torch.randn(4, 3)
    weight = -(B @ A)
    for dtype in (torch.float32, torch.float64):
        got = merged_row_norms(weight.to(dtype), squared_row_norms(weight.to(dtype)), B.to(dtype), A.to(dtype))
        assert (got >= 0).all() and got.max() < 0.05


def test_a_part_of_a_wider_factor():
    weight, B, A = problem((6, 20, 4), torch.float64)
    outside = torch.randn(4, 11, dtype=torch.float64)
    got = merged_row_norms(weight, squared_row_norms(weight), B, A, whole=torch.cat([A, outside], dim=1))
    expected = torch.cat([weight + B @ A, B @ outside], dim=1).norm(dim=1)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(threads):
    weight, B, A = problem((301, 513, 8), torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = merged_row_norms(weight, squared_row_norms(weight), B, A)
        torch.set_num_threads(threads)
        assert torch.equal(merged_row_norms(weight, squared_row_norms(weight), B, A), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows, columns, itemsize", [(1, 1, 2), (64, 10**9, 2), (1000, 4096, 4), (200000, 576, 2)])
def test_blocks_cover_every_row_once_and_keep_to_their_size(rows, columns, itemsize):
    blocks = list(row_blocks(rows, columns, itemsize))
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(rows))
    for block in blocks:
        assert block.start % 64 == 0
        assert (block.stop - block.start) * columns * itemsize <= BLOCK_BYTES or block.stop - block.start <= 64


def test_scratch_is_shared_only_while_no_gradients_are_recorded():
    shape, device = torch.Size([4, 5]), torch.device("cpu")
    assert scratch(shape, torch.float32, device) is None
    with torch.no_grad():
        first, second = scratch(shape, torch.float32, device), scratch(shape, torch.bfloat16, device)
    assert first.shape == second.shape == shape and first.data_ptr() == second.data_ptr()
