"""What the Triton kernels compute, in Triton's interpreter: `python -m helpers.triton_cases NAME`.

It needs a process of its own, because an environment variable chooses the interpreter when triton is imported.
"""

import os
import sys
from contextlib import nullcontext
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora import FlatLoraConfig, get_flat_peft_model, perturbation
from flatlora.ops import merged_row_norms, perturb_weight, philox, squared_row_norms, triton_kernel
from flatlora.ops.four_bit import DoubleScales, FourBitWeight
from flatlora.training import perturbation as perturbation_module
from helpers import noise_cases
from helpers.noise_cases import assert_close, key_of, nans

SEED, SAMPLE, LAYER, FIRST_ROW = 0x0123456789ABCDEF, 2**31 - 1, 2**32 - 2, 77
KEY = key_of(SEED, SAMPLE)
SCALING, RELATIVE = 0.7, 0.125
_convert = interpreter._convert_float


def rounded(data, source, target, mode):
    """float32 to bfloat16 as a GPU rounds, to nearest: the interpreter cuts off."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(data, source, target, mode)
    bits = torch.from_numpy(np.frombuffer(data.tobytes(), np.float32).copy()).bfloat16().view(torch.int16)
    return bits.numpy().view(np.uint16).reshape(data.shape)


interpreter._convert_float = rounded


def factors_of(m, n, r, dtype=torch.float32):
    generator = torch.Generator().manual_seed(r)
    B, A = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
    return B.to(dtype), A.to(dtype), SCALING


def merged(weight, factors, out, **options):
    """W + eps as `out`, and the norms."""
    norms = torch.full((len(weight),), float("nan"))
    options = {"relative": RELATIVE, "first_row": FIRST_ROW} | options
    triton_kernel.perturb_merged(weight, norms, KEY, LAYER, out, factors, **options)
    return norms


def expected_norms(weight, factors):
    B, A, s = factors
    return (weight.double() + s * B.double() @ A.double()).norm(dim=1)


def z_of(first_column, m, n):
    """The definition from a column on, computed from the words of its own column blocks."""
    shift, tile = first_column % 64, first_column // 64
    blocks = 16 * tile + torch.arange(16 * -(-(n + shift) // 64))
    rows = torch.arange(FIRST_ROW, FIRST_ROW + m)[:, None]
    words = philox.philox4x32((blocks, rows, LAYER, SAMPLE), (SEED & philox.WORD, SEED >> 32))
    bits = (torch.stack(torch.broadcast_tensors(*words), dim=-1) >> 8).double()
    radius, angle = (-2 * ((bits[..., 0::2] + 0.5) * 2.0**-24).log()).sqrt(), 2 * torch.pi * 2.0**-24 * bits[..., 1::2]
    z = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).reshape(m, -1, 16, 4)
    return z.transpose(2, 3).flatten(1)[:, shift : shift + n]


def check(weight, factors, out, first_column=0):
    norms = merged(weight, factors, out, first_column=first_column)
    torch.testing.assert_close(norms.double(), expected_norms(weight, factors), rtol=1e-6, atol=0)
    std = (RELATIVE * norms.double())[:, None]
    z = z_of(first_column, *weight.shape)
    if out.dtype == torch.float32:  # the contract is an error of 1e-5 in z; W and the sum are rounded
        error = ((out.double() - weight.double()) - std * z).abs()
        assert (error <= 1e-5 * std + 2.0**-22 * (weight.abs() + std * z.abs())).all()
    else:
        assert_close(out, weight.double() + std * z)
    again = torch.empty_like(out)
    triton_kernel.perturb(
        weight, norms, KEY, LAYER, again, relative=RELATIVE, first_row=FIRST_ROW, first_column=first_column
    )
    assert torch.equal(again, out)


def norms_and_noise():
    """Shapes, dtypes, ranks and strides."""
    for m, n, r in ((1, 1, 1), (5, 63, 0), (20, 130, 8), (17, 257, 3), (33, 128, 40), (16, 64, 65)):
        weight = torch.randn(m, n)
        check(weight, factors_of(m, n, r), nans(m, n, torch.float32))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = torch.randn(20, 130).to(dtype) / 8
        for out_dtype in (dtype, torch.float32):
            for factor_dtype in (torch.float32, torch.bfloat16, torch.float64):
                B, A, s = factors_of(20, 130, 4, factor_dtype)
                check(weight, (B / 8, A / 8, s), nans(20, 130, out_dtype))
    weight = torch.randn(70, 20).T
    check(weight, factors_of(20, 70, 4), nans(70, 20, torch.float32).T)


def agrees_with_the_formula():
    """The norms of ops/norms.py, from ``||W_i||^2 + 2 s (W A^T)_i . B_i + ...``."""
    for dtype in (torch.float32, torch.bfloat16):
        weight, (B, A, s) = torch.randn(20, 200).to(dtype), factors_of(20, 200, 8)
        norms = merged(weight, (B, A, s), torch.empty(20, 200))
        formula = merged_row_norms(weight.float(), squared_row_norms(weight), B, A, s)
        torch.testing.assert_close(norms, formula, rtol=1e-6, atol=0)


def squares_out_of_range():
    """Rows whose squares overflow or vanish in float32, beside ordinary rows and a row of zeros."""
    weight = torch.randn(40, 150) * torch.tensor([1.0, 1e25, 1e-25, 1e-38]).repeat(10)[:, None]
    weight[8] = 0
    B, A, s = factors_of(40, 150, 2)
    B[1:] = 0
    norms = merged(weight, (B, A, s), torch.empty(40, 150))
    torch.testing.assert_close(norms.double(), expected_norms(weight, (B, A, s)), rtol=1e-6, atol=1e-44)
    weight[3, 5], weight[4, 5] = float("nan"), float("inf")
    norms = merged(weight, (B, A, s), torch.empty(40, 150))
    assert norms[3].isnan() and norms[4].isinf() and norms[5].isfinite()


def first_columns():
    for first_column in (1, 16, 63, 64, 100, 2**20 + 5, 2**34 - 130):
        check(torch.randn(3, 130), factors_of(3, 130, 2), nans(3, 130, torch.float32), first_column)


def four_bit(m, n, block, dtype, is_double):
    generator = torch.Generator().manual_seed(m + n)
    blocks = -(-m * n // block)
    packed = torch.randint(0, 256, (-(-m * n // 2),), dtype=torch.uint8, generator=generator)
    scales, double = torch.rand(blocks, generator=generator), None
    if is_double:
        scales = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        # powers of two, so that a fused product and sum rounds as two operations do
        outer = 2.0 ** -torch.randint(0, 8, (-(-blocks // 4),), generator=generator).float()
        double = DoubleScales(torch.arange(256) / 256, outer, torch.tensor(0.25), 4)
    code = torch.randn(16, generator=generator)
    return FourBitWeight(packed, scales, code, torch.Size((m, n)), dtype, block, double)


def four_bits():
    """Decoding in the kernel changes no bit: blocks over ends of rows, odd rows, odd first columns, blocks of rows."""
    cases = [(20, 128, 64), (9, 66, 64), (7, 65, 32), (5, 192, 256)]
    for m, n, block in cases:
        for is_double, dtype in ((False, torch.float32), (True, torch.bfloat16), (True, torch.float16)):
            stored, factors = four_bit(m, n, block, dtype, is_double), factors_of(m, n, 4)
            for rows, first_column in ((slice(0, m), 0), (slice(3, m - 1), 7)):
                part, dense = stored.block_of_rows(rows), stored[rows]
                few = (factors[0][rows], *factors[1:])
                outs = nans(*dense.shape, torch.float32), nans(*dense.shape, torch.float32)
                norms = [
                    merged(weight, few, out, first_column=first_column)
                    for weight, out in zip((part, dense), outs, strict=True)
                ]
                assert torch.equal(*norms) and torch.equal(*outs), (m, n, block, dtype)
                assert torch.equal(dense, stored.dequantize()[rows])
                triton_kernel.perturb(
                    part, norms[0], KEY, LAYER, outs[1].fill_(float("nan")), relative=RELATIVE, first_row=FIRST_ROW,
                    first_column=first_column,
                )  # fmt: skip
                assert torch.equal(*outs)
    weight = four_bit(8, 64, 64, torch.bfloat16, True)
    results = [perturb_weight(weight, torch.ones(8), KEY, 3, backend=b, dtype=torch.float32) for b in ("triton", "c")]
    assert_close(*results)


def values_in_device_memory():
    """Between two launches of the same arguments, only what the tensors hold changes, as in a captured graph."""
    weight, factors = torch.randn(4, 70), factors_of(4, 70, 2)
    key, relative, out, norms = key_of(1, 2), torch.tensor(0.5), torch.empty(4, 70), torch.empty(4)
    for seed, sample, strength in ((1, 2, 0.5), (1, 3, 0.25), (-7, 0, 0.0)):
        key[0], key[1] = seed, sample
        relative.fill_(strength)
        triton_kernel.perturb_merged(weight, norms, key, LAYER, out, factors, relative=relative)
        expected = torch.empty(4, 70)
        triton_kernel.perturb(weight, norms, key_of(seed, sample), LAYER, expected, relative=strength)
        assert torch.equal(out, expected)
        triton_kernel.perturb(weight, norms, key, LAYER, expected.zero_(), relative=relative)
        assert torch.equal(out, expected)
        assert_close(out, noise_cases.definition(weight, strength * norms, seed, sample, LAYER, 0))


def block_sizes():
    """No bit depends on the block size."""
    weight, factors = torch.randn(70, 300), factors_of(70, 300, 4)
    for module, names in ((triton_kernel, ("NOISE", "MERGED")),):
        results = []
        sizes = {name: getattr(module, name) for name in names}
        for k in range(max(map(len, sizes.values()))):
            for name, known in sizes.items():
                setattr(module, name, (known[min(k, len(known) - 1)],))
            out, noise = nans(70, 300, torch.float32), nans(70, 300, torch.float32)
            norms = merged(weight, factors, out)
            triton_kernel.perturb(weight, torch.ones(70), KEY, LAYER, noise)
            results.append((norms, out, noise))
        assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


class NoHost(TorchDispatchMode):
    """Refuses operators that read a value on the host, which on a GPU waits for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        return function(*args, **(kwargs or {}))


def one_layer(backend, **settings):
    """A flat layer whose factors are not zero."""
    torch.manual_seed(0)
    config = FlatLoraConfig(
        r=4, target_modules=["0"], rho=0.3, seed=5, backend=backend, init_lora_weights=False, **settings
    )
    return get_flat_peft_model(nn.Sequential(nn.Linear(70, 40)), config)


def gradients(model, x):
    model.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def a_model_without_the_host():
    """The training step of the C kernel, within rounding, and no value that the host reads."""
    x = torch.randn(6, 70)
    results = []
    for backend in ("c", "triton"):
        model = one_layer(backend, schedule="constant")
        with NoHost() if backend == "triton" else nullcontext():
            results.append(gradients(model, x) + gradients(model, x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(results[0][0], results[0][len(results[0]) // 2])  # another sample


def replays_in_a_model():
    """What a captured graph reads: with the values of a step in place, the noise is that of this step."""
    model, eager = (one_layer("triton", total_steps=4) for _ in range(2))
    x, noise = torch.randn(6, 70), perturbation(model)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-5) for m in (model, eager)]
    with mock.patch.object(perturbation_module, "is_capturing", return_value=True):
        with pytest.raises(RuntimeError, match="graph.prepare"):
            noise.draw(x.device)
    noise.graph.prepare("cpu")
    key, rho_t = noise.graph.key(x.device, noise.sample), noise.graph.rho_t(x.device, "default")
    strengths = []
    for step in range(4):
        if step:
            noise.graph.update()
        assert noise.sample == step and rho_t.item() == torch.tensor(noise.rho_t, dtype=torch.float32)
        with mock.patch.object(perturbation_module, "is_capturing", return_value=True):
            assert noise.draw(x.device)[0] is key
            found = gradients(model, x)
        torch.testing.assert_close(found, gradients(eager, x), rtol=1e-5, atol=2e-5)  # rho_t is in float32
        assert key.tolist() == [5, step]
        strengths.append(rho_t.item())
        for optimizer in optimizers:
            optimizer.step()
    assert strengths == sorted(strengths) and strengths[0] == 0 < strengths[-1]


if __name__ == "__main__":
    torch.manual_seed(0)
    globals()[sys.argv[1]]()
    print("agrees")
