"""The noise of a part of a weight is that part of the noise of the whole weight."""

import pytest
import torch
from helpers.noise_cases import key_of, random_case

from flatlora.ops import native, philox
from flatlora.ops.perturb import perturb_weight
from flatlora.ops.products import perturbed_linear

M, N = 37, 333
KEY, LAYER = key_of(11 - 2**63, 5), 9
needs_c = pytest.mark.skipif(native.LIBRARY is None, reason="the C kernel was not built")
kernels = pytest.mark.parametrize("kernel", range(native.BEST + 1), ids=native.KERNELS[: native.BEST + 1])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COLUMNS = [
    (0, 1),
    (0, 64),
    (1, 2),
    (3, 130),
    (16, 48),
    (63, 65),
    (64, 333),
    (65, 66),
    (128, 200),
    (192, 333),
    (332, 333),
]
LAYOUTS = {
    "rows": lambda part: part.contiguous(),
    "slice": lambda part: part,
    "columns": lambda part: part.t().contiguous().t(),
    "broadcast": lambda part: part[:, :1].expand(part.shape),
}


@needs_c
@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_c_makes_the_bits_of_the_whole(layout, dtype, kernel):
    weight, row_std = random_case(M, N, dtype)
    if layout == "broadcast":
        weight = weight[:, :1].expand(M, N)
    for out_dtype in (dtype, torch.bfloat16):
        whole = torch.empty(M, N, dtype=out_dtype)
        native.perturb(weight, row_std, KEY, LAYER, whole, kernel=kernel)
        for first_row, last_row in ((0, M), (5, 23)):
            rows = slice(first_row, last_row)
            for first, last in COLUMNS:
                part = LAYOUTS[layout](weight[rows, first:last])
                frame = torch.full((last_row - first_row + 2, last - first + 2), float("nan"), dtype=out_dtype)
                out = frame[1:-1, 1:-1]
                options = {"first_row": first_row, "first_column": first, "kernel": kernel}
                native.perturb(part, row_std[rows], KEY, LAYER, out, **options)
                assert torch.equal(out, whole[rows, first:last])
                assert frame.isnan().sum() == frame.numel() - out.numel()  # nothing is written around it


def test_the_reference_makes_the_bits_of_the_whole():
    rows = torch.arange(M)
    whole = philox.normals(3, 4, LAYER, rows, N)
    for first, last in COLUMNS:
        assert torch.equal(philox.normals(3, 4, LAYER, rows, last - first, first), whole[:, first:last])
    assert philox.normals(3, 4, LAYER, rows[:0], 5, 70).shape == (0, 5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("c", marks=needs_c)])
def test_columns_far_beyond_32_bits_of_columns(backend):
    """The index of a block of four columns is a 32-bit word."""
    last = 2**34
    z = perturb_weight(torch.zeros(1, 70), torch.ones(1), KEY, 0, first_column=last - 70, backend=backend)
    counter = (2**32 - 1, 0, 0, 5)
    words = philox.philox4x32(counter, (11, 2**31))
    torch.testing.assert_close(z[0, -1].double(), _fourth_normal(words), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"first_column must be an integer in \[0, 17179869115\), got 17179869115"):
        perturb_weight(torch.zeros(1, 70), torch.ones(1), KEY, 0, first_column=last - 69, backend=backend)
    with pytest.raises(ValueError, match="first_column must be an integer in .*, got -1"):
        perturb_weight(torch.zeros(1, 70), torch.ones(1), KEY, 0, first_column=-1, backend=backend)


def _fourth_normal(words):
    bits = torch.tensor([word >> 8 for word in words], dtype=torch.float64)
    return (-2 * torch.log((bits[2] + 0.5) * 2.0**-24)).sqrt() * torch.sin(2 * torch.pi * bits[3] * 2.0**-24)


def test_parts_of_the_torch_backend_have_noise_of_their_own():
    """It is a function of the first column, and not a part of the whole."""
    zero, ones = torch.zeros(M, 64), torch.ones(M)
    first, second, again = (
        perturb_weight(zero, ones, KEY, LAYER, first_column=c, backend="torch") for c in (0, 64, 64)
    )
    assert torch.equal(second, again)
    assert torch.equal(first, perturb_weight(zero, ones, KEY, LAYER, backend="torch"))
    assert (first * second).mean().abs() < 5 / (M * 64) ** 0.5


@pytest.mark.parametrize("backend", ["reference", pytest.param("c", marks=needs_c)])
@pytest.mark.parametrize("blocks", [1, 8], ids=["one block", "several blocks"])
def test_products_of_shards_sum_to_the_product(backend, blocks, monkeypatch):
    m, n = 150, 300
    monkeypatch.setattr("flatlora.ops.blocks.BLOCK_BYTES", m * n * 8 // blocks + 1)
    generator = torch.Generator().manual_seed(0)
    weight, row_std = torch.randn(m, n, generator=generator).double(), torch.rand(m, generator=generator).double()
    x = torch.randn(7, n, generator=generator).double().requires_grad_()

    def product(x, rows=slice(0, m), columns=slice(0, n)):
        where = {"first_row": rows.start, "first_column": columns.start}
        part = weight[rows, columns]
        return perturbed_linear(x[:, columns], part, None, row_std[rows], KEY, LAYER, backend=backend, **where)

    whole = product(x)
    (gradient,) = torch.autograd.grad(whole.square().sum(), x)
    for parts in ([slice(0, 101), slice(101, m)], [slice(0, 64), slice(64, m)]):
        split = torch.cat([product(x, rows=rows) for rows in parts], dim=-1)
        torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(split.square().sum(), x)[0], gradient, rtol=1e-12, atol=1e-10)
    for parts in ([slice(0, 128), slice(128, n)], [slice(0, 77), slice(77, n)]):
        summed = sum(product(x, columns=columns) for columns in parts)
        torch.testing.assert_close(summed, whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(summed.square().sum(), x)[0], gradient, rtol=1e-12, atol=1e-10)
