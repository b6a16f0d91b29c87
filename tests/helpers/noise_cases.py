"""Cases for every backend of the noise contract, and the comparison with the definition."""

import torch

from flatlora.ops import philox

# key words, counter words, output words: the known answers that Random123 publishes for philox4x32-10
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# seed, sample, layer, first row, m, n: odd shapes, and indices near the ends of their ranges
STREAMS = [
    (0, 0, 0, 0, 1, 1),
    (1, 2, 3, 4, 5, 63),
    (-1, 7, 2**32 - 1, 0, 3, 64),
    (-(2**63), 2**32 - 1, 0, 2**31 - 2, 4, 65),
    (2**63 - 1, 2**31, 2**31, 2**32 - 4, 3, 130),
    (0x0123456789ABCDEF, 2**31 - 1, 2**32 - 2, 77, 70, 257),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# a unit in the last place of numbers below 8, the bound of all values
UNIT = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}


def key_of(seed, sample):
    return torch.tensor([seed, sample])


def random_case(m, n, dtype, generator_seed=0):
    generator = torch.Generator().manual_seed(generator_seed)
    weight = torch.randn(m, n, generator=generator).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return weight, torch.rand(m, generator=generator, dtype=wide)


def definition(weight, row_std, seed, sample, layer, first_row):
    """W + std z in float64."""
    rows = torch.arange(first_row, first_row + weight.shape[0])
    z = philox.normals(seed, sample, layer, rows, weight.shape[1]).double()
    return weight.double() + row_std.double()[:, None] * z


def assert_close(actual, expected):
    """Assert an error of at most 1e-5, and one unit in the last place of a 16-bit dtype."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= 1e-5 + UNIT[actual.dtype], error  # NaN fails too


def nans(m, n, dtype):
    """An output tensor of NaN, which shows elements that nothing wrote."""
    return torch.full((m, n), float("nan"), dtype=dtype)


DEFAULTS = [torch.bfloat16, torch.float16, torch.float64]  # dtypes that a user may make torch's default


def problem(dtype, m=130, n=70, r=3):
    """W, B, A, x, row norms and a key. The dtype and the device of each tensor are explicit."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, B, A, x = random(m, n).to(dtype), random(m, r).to(wide), random(r, n).to(wide), random(4, n).to(dtype)
    return weight, B, A, x, random(m).to(wide).abs(), torch.tensor([5, -6], dtype=torch.int64, device="cpu")
