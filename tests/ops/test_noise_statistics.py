"""Statistics of 1e8 normals of the C kernel. Every bound is computed from the number of values: a true generator
exceeds one of them with a chance below 1e-5. The streams are fixed, so no run can fail by bad luck."""

import math

import pytest
import torch

from flatlora.ops import native, philox
from flatlora.ops.perturb import perturb_weight

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason="the C kernel was not built")
SIGMAS = 5.0


def normals(m, n, seed=1, sample=0, layer=0, first_row=0):
    return perturb_weight(
        torch.zeros(1).expand(m, n), torch.ones(m), torch.tensor([seed, sample]), layer, first_row, backend="c"
    )


def test_moments_and_distribution():
    """Mean, variance, skewness, kurtosis, and the Kolmogorov-Smirnov distance on a grid of 2^16 points."""
    chunks, m, n = 25, 1000, 4000
    count, bins = chunks * m * n, 2**16
    sums, below = torch.zeros(4, dtype=torch.float64), torch.zeros(bins, dtype=torch.float64)
    for chunk in range(chunks):
        z = normals(m, n, first_row=chunk * m).flatten()
        square = z * z
        for k, power in enumerate((z, square, square * z, square * square)):
            sums[k] += power.view(-1, 1000).sum(dim=1).double().sum()
        below += torch.histc(z, bins, -8, 8).double()
    mean, second, third, fourth = (sums / count).tolist()
    assert below.sum() == count  # nothing lies beyond 8: the largest value is sqrt(50 ln 2) = 5.89
    assert abs(mean) < SIGMAS / math.sqrt(count)
    assert abs(second - 1) < SIGMAS * math.sqrt(2 / count)
    assert abs(third) < SIGMAS * math.sqrt(15 / count)
    assert abs(fourth - 3) < SIGMAS * math.sqrt(96 / count)
    edges = torch.linspace(-8, 8, bins + 1, dtype=torch.float64)[1:]
    distance = (below.cumsum(0) / count - torch.special.ndtr(edges)).abs().max().item()
    p = 2 * math.exp(-2 * count * distance**2)  # the first term of Kolmogorov's distribution
    assert p > 1e-5, (distance, p)


def test_tails():
    """Values beyond 3, 4 and 5 standard deviations have the right frequency."""
    z = torch.cat([normals(1000, 4000, layer=layer).flatten().abs() for layer in range(5)])
    for bound in (3, 4, 5):
        p = math.erfc(bound / math.sqrt(2))
        expected = p * len(z)
        assert abs((z > bound).sum().item() - expected) < SIGMAS * math.sqrt(expected) + 1


M, N = 1024, 4096  # 4.2e6 values
RELATED = {
    "next sample": dict(sample=1),
    "next layer": dict(layer=1),
    "next seed": dict(seed=2),
    "high word of the seed": dict(seed=1 + 2**32),
    "negated seed": dict(seed=-1),
    "other rank": dict(seed=philox.mix_rank(1, 1)),
    "layer and sample swapped": dict(layer=3, sample=5),
}


def assert_uncorrelated(x, y):
    """Assert that values, squares and signs are uncorrelated."""
    x, y = x.flatten(), y.flatten()
    for f in (torch.clone, lambda t: (t * t - 1) / math.sqrt(2), torch.sign):
        correlation = (f(x) * f(y)).double().mean().item()
        assert abs(correlation) < SIGMAS / math.sqrt(x.numel())


@pytest.mark.parametrize("change", RELATED.values(), ids=RELATED.keys())
def test_streams_are_uncorrelated(change):
    start = dict(layer=5, sample=3) if len(change) == 2 else {}
    assert_uncorrelated(normals(M, N, **start), normals(M, N, **change))


@pytest.mark.parametrize("lag", [1, 2, 63, 64, 512])
def test_rows_are_uncorrelated(lag):
    z = normals(M, N)
    assert_uncorrelated(z[:-lag], z[lag:])


@pytest.mark.parametrize("lag", [1, 15, 16, 17, 32, 48, 64, 1024])
def test_columns_are_uncorrelated(lag):
    z = normals(M, N)
    assert_uncorrelated(z[:, :-lag], z[:, lag:])


def test_sums_of_rows_and_columns_are_normal():
    """Chi-square of the row and column sums: structure that pairwise correlations would miss."""
    z = normals(M, N).double()
    for dim, length in ((0, M), (1, N)):
        sums = z.sum(dim) / math.sqrt(length)
        degrees = sums.numel()
        assert abs((sums * sums).sum().item() - degrees) < SIGMAS * math.sqrt(2 * degrees)
