"""Row norms of the merged weight, and blocks that cover every row once."""

import math

import pytest
import torch

from flatlora.ops import merged_row_norms, native, perturb_weight, row_norms_of_sum, squared_row_norms
from flatlora.ops.blocks import BLOCK_BYTES, row_blocks, scratch
from flatlora.ops.norms import grouped_row_norms, row_norms, vector_norms

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


@pytest.mark.skipif(native.LIBRARY is None, reason="the C kernel was not built")
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


# magnitudes of rows: squares that overflow float32, vanish in it, are subnormal; and ordinary ones
MAGNITUDES = {
    "large": [1e19],
    "small": [1e-23],
    "tiny": [1e-30],
    "mixed": [1e19, 1, 0, 1e-23, 3e-20, 1e-38, 1e36, 1e-3],
}
WIDE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def out_of_range(name, dtype, factors):
    """W with such rows, and B, which is 0, of the size that W has, or ordinary."""
    m, n, r = 24, 70, 3
    scale = torch.tensor(MAGNITUDES[name]).repeat(m)[:m, None]
    weight, A = torch.randn(m, n).mul(scale).to(dtype), torch.randn(r, n)
    return (
        weight,
        {"B = 0": torch.zeros(m, r), "like W": torch.randn(m, r) * scale, "ordinary": torch.randn(m, r)}[factors],
        A,
    )


def assert_norms(got, expected):
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(got.double(), expected, rtol=3e-6, atol=1e-44)


@WIDE
@pytest.mark.parametrize("factors", ["B = 0", "like W", "ordinary"])
@pytest.mark.parametrize("name", MAGNITUDES)
def test_norms_over_the_range_of_float32(name, dtype, factors):
    weight, B, A = out_of_range(name, dtype, factors)
    expected = by_definition(weight, B, A, 0.7)
    squared = squared_row_norms(weight)
    torch.testing.assert_close(squared.double(), weight.double().square().sum(dim=1), rtol=3e-6, atol=0)
    assert_norms(row_norms(weight), weight.double().norm(dim=1))
    for kernel in range(native.BEST + 1) if native.has_norms(weight) else ():
        assert_norms(native.merged_row_norms(weight, B, A, 0.7, kernel=kernel), expected)
    if dtype == torch.float32 or native.LIBRARY is not None:  # torch's own path rounds A to bfloat16
        assert_norms(merged_row_norms(weight, squared, B, A, 0.7), expected)
    if dtype == torch.float32:  # torch's own path for a weight whose rows are apart; it rounds A to the weight's dtype
        columns = weight.T.contiguous().T
        assert_norms(merged_row_norms(columns, squared_row_norms(columns), B, A, 0.7), expected)
        cross = (A.double() @ weight.double().T).float()
        assert_norms(row_norms_of_sum(squared, cross, B, A, 0.7), expected)
        groups = grouped_row_norms(columns[:, :35], squared_row_norms(columns[:, :35]), [0.7 * B], [A.repeat(2, 1)], 2)
        inside = torch.zeros(24, 70, dtype=torch.float64)
        inside[:12, :35], inside[12:, 35:] = columns[:12, :35].double(), columns[12:, :35].double()
        assert_norms(groups, by_definition(inside, B, A, 0.7))


def test_ordinary_rows_keep_their_bits_beside_rows_out_of_range():
    weight, B, A = out_of_range("mixed", torch.float32, "ordinary")
    for form in (weight, weight.T.contiguous().T):
        squared = squared_row_norms(form)
        ordinary = torch.where(torch.arange(len(form)) % 8 == 1, 1.0, 0.0)[:, None] * form  # a row of ones; zeros
        norms, expected = (
            merged_row_norms(form, squared, B, A),
            merged_row_norms(ordinary, squared_row_norms(ordinary), B, A),
        )
        assert squared.dtype == torch.float64 and torch.equal(norms[1::8], expected[1::8])
        assert torch.equal(row_norms(form)[1::8], row_norms(ordinary)[1::8])


def test_rows_of_zeros_are_ordinary():
    weight = torch.randn(9, 40)
    weight[::2] = 0
    squared = squared_row_norms(weight)
    assert squared.dtype == torch.float32 and torch.equal(squared, weight.square().sum(dim=1))
    assert torch.equal(row_norms(weight), squared.sqrt())


@pytest.mark.parametrize("scale", [1e19, 1e-23, 1e-30])
@WIDE
def test_the_noise_has_its_strength_where_squares_leave_the_range(dtype, scale):
    """Compare with the noise of the weight without the scale, times the scale."""
    scale = 2.0 ** round(math.log2(scale))
    weight, norms = torch.randn(20, 130).to(dtype), torch.empty(20)
    B, A, key = torch.zeros(20, 2), torch.randn(2, 130), torch.tensor([1, 2])
    options = {"relative": 0.1, "dtype": torch.float32}
    plain = perturb_weight(weight, squared_row_norms(weight).sqrt(), key, 0, **options)
    for made in ({}, {"factors": (B, A, 1.0)}) if native.has_norms(weight) else ({},):
        norms = merged_row_norms(weight * scale, squared_row_norms(weight * scale), B, A)
        scaled = perturb_weight(weight * scale, norms, key, 0, **options, **made)
        torch.testing.assert_close(scaled / scale, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e19, 1e-23, 1e-30, 0.0])
def test_vector_norms_over_the_range_of_float32(scale):
    x = torch.randn(5, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale
    x[2] = 0
    got = vector_norms(x.float(), torch.float32)
    torch.testing.assert_close(got.double(), x.float().double().norm(dim=1), rtol=1e-6, atol=0)
    if scale == 1.0:  # ordinary numbers keep their bits
        assert torch.equal(got, torch.linalg.vector_norm(x.float(), dim=1))
