"""The noise contract (words, normals, W + eps) in the reference and in the C kernel."""

import math

import pytest
import torch
from helpers.noise import epsilon, unit_noise
from helpers.noise_cases import DTYPES, KNOWN, STREAMS, assert_close, definition, key_of, nans, random_case

from flatlora.ops import native, philox
from flatlora.ops.perturb import perturb_weight, row_noise

needs_c = pytest.mark.skipif(native.LIBRARY is None, reason="the C kernel was not built")
kernels = pytest.mark.parametrize("kernel", [pytest.param(k, id=native.KERNELS[k]) for k in range(native.BEST + 1)])
streams = pytest.mark.parametrize("seed, sample, layer, first_row, m, n", STREAMS)


@pytest.mark.parametrize("key, counter, expected", KNOWN)
def test_known_answers_reference(key, counter, expected):
    assert philox.philox4x32(counter, key) == expected
    tensors = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(t.item() for t in tensors) == expected


@needs_c
@kernels
@pytest.mark.parametrize("key, counter, expected", KNOWN)
def test_known_answers_c(key, counter, expected, kernel):
    (block, row, layer, sample), seed = counter, key[0] | key[1] << 32
    seed -= (seed >> 63) << 64
    words = native.words(torch.tensor([row]), 1, key_of(seed, sample), layer, first_block=block, kernel=kernel)
    assert tuple(words[0, 0].tolist()) == expected


@needs_c
@kernels
@streams
def test_words_are_bit_equal(seed, sample, layer, first_row, m, n, kernel):
    rows = torch.arange(first_row, first_row + m).flip(0)
    words = native.words(rows, n, key_of(seed, sample), layer, kernel=kernel)
    assert torch.equal(words, philox.words(seed, sample, layer, rows, n))


@needs_c
def test_normals_of_every_word():
    """All 2^24 uniforms under the logarithm and all 2^24 angles, against float64."""
    for bits in torch.arange(2**24).split(2**21):
        turns = (bits * 5 + 12345) % 2**24  # a permutation
        words = torch.stack((bits, turns, bits, turns), dim=1) << 8 | 0x5A  # the low bits must not matter
        radius = torch.sqrt(-2 * torch.log((bits.double() + 0.5) * 2.0**-24))
        angle = 2 * math.pi * 2.0**-24 * turns.double()
        exact = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
        for kernel in range(native.BEST + 1):
            z = native.normals(words, kernel=kernel)
            assert torch.equal(z[:, :2], z[:, 2:])
            assert (z[:, :2] - exact).abs().max() < 2e-6


EDGES = [0, 1, 2, 2**22, 2**23 - 1, 2**23, 2**23 + 1, 11863282, 11863283, 2**24 - 2, 2**24 - 1]  # 2^24 sqrt(1/2) too


@needs_c
@kernels
@pytest.mark.parametrize("k", EDGES)
def test_normals_at_the_edges_of_u(k, kernel):
    z = native.normals(torch.tensor([[k << 8, 0, k << 8, 0]]), kernel=kernel)[0]
    u = (k + 0.5) * 2.0**-24
    exact = math.sqrt(-2 * math.log(u)) if u < 0.5 else math.sqrt(-2 * math.log1p(u - 1))
    assert z[0].item() == pytest.approx(exact, abs=1e-5, rel=1e-6)
    assert z.tolist() == [z[0].item(), 0.0, z[0].item(), 0.0]


@streams
def test_columns_are_dealt_out_in_tiles(seed, sample, layer, first_row, m, n):
    """Compare with the layout of the contract, one element at a time."""
    z = philox.normals(seed, sample, layer, torch.tensor([first_row]), n)[0]
    for j in range(n):
        tile, q, lane = j // 64, j % 64 // 16, j % 16
        words = philox.philox4x32(
            (16 * tile + lane, first_row, layer, sample), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        )
        radius, angle = words[q // 2 * 2] >> 8, words[q // 2 * 2 + 1] >> 8
        trig = math.sin if q % 2 else math.cos
        value = math.sqrt(-2 * math.log((radius + 0.5) * 2.0**-24)) * trig(2 * math.pi * angle * 2.0**-24)
        assert z[j].item() == pytest.approx(value, abs=1e-6)


def layouts(weight):
    """One weight in several layouts: row-major, transposed (GPT-2's Conv1D), a slice, and with both strides > 1."""
    m, n = weight.shape
    wide = torch.zeros(m, n + 3, dtype=weight.dtype)
    wide[:, 1 : n + 1] = weight
    apart = torch.zeros(2 * m, 3 * n, dtype=weight.dtype)
    apart[::2, ::3] = weight
    return {
        "rows": weight,
        "columns": weight.t().contiguous().t(),
        "slice": wide[:, 1 : n + 1],
        "apart": apart[::2, ::3],
    }


@needs_c
@kernels
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_c_agrees_with_the_definition(dtype, out_dtype, kernel):
    for seed, sample, layer, first_row, m, n in STREAMS:
        weight, row_std = random_case(m, n, dtype)
        expected = definition(weight, row_std, seed, sample, layer, first_row)
        results = []
        for form in layouts(weight).values():
            for out in layouts(nans(m, n, out_dtype)).values():
                native.perturb(form, row_std, key_of(seed, sample), layer, out, first_row=first_row, kernel=kernel)
                results.append(out)
        assert_close(results[0], expected)
        assert all(torch.equal(r, results[0]) for r in results)


@needs_c
def test_c_rounds_like_torch():
    """With std = 0 weights are rounded to nearest even, infinities and NaN included."""
    halves = torch.arange(2**16).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = halves.view(dtype).float()
        between = torch.nextafter(values, torch.tensor(math.inf)), (values + values.roll(1)) / 2, values * 1.0009765625
        for x in (values, *between):
            weight = x.reshape(256, 256)
            for kernel in range(native.BEST + 1):
                for w in (weight, weight.to(dtype)):
                    out = nans(256, 256, dtype)
                    native.perturb(w, torch.zeros(256), key_of(0, 0), 0, out, kernel=kernel)
                    torch.testing.assert_close(out, w.to(dtype), rtol=0, atol=0, equal_nan=True)


BACKENDS = ["reference", "torch", pytest.param("c", marks=needs_c)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_blocks_in_any_order(backend):
    weight, row_std = random_case(200, 130, torch.bfloat16)
    key = key_of(-3, 5)
    whole = perturb_weight(weight, row_std, key, 9, backend=backend)
    pieces = nans(200, 130, torch.bfloat16)
    for a, b in [(100, 163), (0, 1), (163, 200), (1, 100)]:
        pieces[a:b] = perturb_weight(weight[a:b], row_std[a:b], key, 9, a, backend=backend)
    assert torch.equal(pieces, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_noise_is_the_noise_of_those_rows(backend):
    row_std = random_case(300, 1, torch.float32)[1]
    key = key_of(12, 34)
    whole = perturb_weight(torch.zeros(1).expand(300, 70), row_std, key, 1, backend=backend)
    rows = torch.tensor([299, 0, 5, 5, 64, 63, 0])
    assert torch.equal(row_noise(rows, row_std[rows], key, 1, 70, backend=backend), whole[rows])
    assert row_noise(rows[:0], row_std[:0], key, 1, 70, backend=backend).shape == (0, 70)
    short = row_noise(rows, row_std[rows], key, 1, 70, dtype=torch.bfloat16, backend=backend)
    assert torch.equal(short, whole[rows].bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_is_only_read_and_out_is_filled(backend):
    weight, row_std = random_case(33, 70, torch.float32)
    before, key = weight.clone(), key_of(1, 1)
    new = perturb_weight(weight, row_std, key, 0, backend=backend, dtype=torch.bfloat16)
    out = nans(70, 33, torch.bfloat16).t()
    assert perturb_weight(weight, row_std, key, 0, backend=backend, out=out) is out
    assert torch.equal(out, new) and new.is_contiguous()
    assert torch.equal(weight, before)


@needs_c
def test_more_elements_than_an_int32_counts(tmp_path):
    """Two rows that are 2^31 elements apart, in a sparse file."""
    stride, n = 2**31, 130
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + n, dtype=torch.bfloat16)
    weight = storage.as_strided((2, n), (stride, 1))
    values, row_std = random_case(2, n, torch.bfloat16)
    weight.copy_(values)
    for form, std in ((weight, row_std), (storage.as_strided((n, 2), (1, stride)), torch.ones(n))):
        result = perturb_weight(form, std, key_of(1, 2), 3, 2**31 - 1, backend="c", dtype=torch.float32)
        assert_close(result, definition(form, std, 1, 2, 3, 2**31 - 1))
    out = storage.as_strided((2, n), (stride, 1))
    perturb_weight(values, row_std, key_of(1, 2), 3, backend="c", out=out)
    assert_close(out, definition(values, row_std, 1, 2, 3, 0))
    broadcast = torch.zeros(1).expand(2**40, n)[2**32 - 2 : 2**32]  # addresses of rows 2^32 * n apart, all of them 0
    result = perturb_weight(broadcast, torch.ones(2), key_of(1, 2), 3, 2**32 - 2, backend="c")
    assert_close(result, definition(broadcast, torch.ones(2), 1, 2, 3, 2**32 - 2))


def test_ranks_get_different_keys():
    keys = {philox.mix_rank(seed, rank) for seed in range(10) for rank in range(1000)}
    assert len(keys) == 10_000 and philox.mix_rank(5, 0) == 5
    assert all(-(2**63) <= key < 2**63 for key in keys)


@needs_c  # "auto" takes torch's generators where there is no kernel
@pytest.mark.parametrize("rank", [0, 3])
def test_the_eps_that_all_tests_compare_with(rank):
    """`helpers/noise.py` against the reference of the noise contract, the seed mixed with the rank by hand."""
    mixed = (-9 ^ rank * 0x9E3779B97F4A7C15) % 2**64
    expected = philox.normals(mixed - 2**64 * (mixed >= 2**63), 4, 2, torch.arange(5), 70).double()
    torch.testing.assert_close(unit_noise(5, 70, 2, seed=-9, sample=4, rank=rank), expected, rtol=0, atol=1e-5)
    merged = torch.randn(5, 70, dtype=torch.float64)
    eps = epsilon(merged, 2, rho=0.3, seed=-9, sample=4, rank=rank)
    expected *= 0.3 / 70**0.5 * merged.square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(eps, expected, rtol=0, atol=1e-5)
