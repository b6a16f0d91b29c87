"""Fixtures of the analysis tests."""

import pytest
import torch
from helpers.landscapes import Net

from flatlora.analysis import directions


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Several threads are slower than one on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().train()
    model.norm.eval()  # a mixed training mode
    return model


@pytest.fixture
def ids():
    return [torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(k)) for k in range(2)]


@pytest.fixture
def dense_noise():
    """The unit noise z of a weight along a direction, of shape (m, n)."""

    def make(weight, direction, seed=0):
        along = directions.Directions([weight], "plain", seed, {weight.name: torch.ones(weight.shape[0])})
        zero = torch.zeros(weight.shape, dtype=torch.float64)
        return along.at([(1.0, direction)])(weight, zero)

    return make
