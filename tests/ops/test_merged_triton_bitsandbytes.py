"""4-bit weights of bitsandbytes as the operand of a kernel."""

import pytest
import torch
from helpers.noise_cases import key_of
from torch import nn

from flatlora.layers.quantized_rows import FourBitRows
from flatlora.ops import perturb_weight, rebuilt_linear

bnb = pytest.importorskip("bitsandbytes")


def quantized(m, n, kind, double, dtype, block=64):
    """A layer as bitsandbytes makes it."""
    torch.manual_seed(m)
    weight = bnb.nn.Params4bit(
        torch.randn(m, n).to(dtype), requires_grad=False, quant_type=kind, compress_statistics=double, blocksize=block
    )
    layer = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=dtype, quant_type=kind, compress_statistics=double)
    layer.weight = weight
    return layer.to("cpu")


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("m, n, block", [(24, 128, 64), (10, 66, 64), (9, 256, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_numbers_are_those_of_bitsandbytes(m, n, block, kind, double, dtype):
    rows = FourBitRows(quantized(m, n, kind, double, dtype, block))
    weight = rows.in_four_bits()
    dense = bnb.functional.dequantize_4bit(rows.packed, rows.state)
    assert weight.shape == dense.shape and weight.dtype == dense.dtype
    assert torch.equal(weight.dequantize(), dense)
    assert torch.equal(weight[3:7], dense[3:7])


def test_a_product_with_the_stored_weight():
    """Decoded block by block or by the operator, the product and its gradient have the same bits."""
    rows = FourBitRows(quantized(24, 128, "nf4", True, torch.float32))
    x, std, key = torch.randn(5, 128, requires_grad=True), torch.rand(24), key_of(3, 4)
    results = []
    for weight in (rows, rows.in_four_bits()):
        out = rebuilt_linear(x, weight, None, std, key, 2)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out.detach(), grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    noisy = perturb_weight(rows.in_four_bits(), std, key, 2)
    assert torch.equal(results[0][0], nn.functional.linear(x.detach(), noisy))
