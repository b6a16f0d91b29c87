"""Tests of the methods that use gradients, where an engine divides the factors among processes.

A file of tests derives a class and names its engines. The parameters of one process are met to the rounding of sums
that are split over processes.
"""

import pytest
import torch

from helpers import processes
from helpers.engines import ENGINES
from helpers.method_runs import KINDS, STEPS, alone

WAYS = {"plain": False, "accumulated": True}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


class MethodTests:
    """The fixture `method_runs` is in `spread/conftest.py`."""

    pytestmark = [processes.patient, pytest.mark.slow]
    engines = ()

    def pytest_generate_tests(self, metafunc):
        metafunc.parametrize("engine", self.engines, scope="class")

    @pytest.fixture(params=KINDS)
    def name(self, request):
        return request.param

    @pytest.fixture
    def ranks(self, engine, method_runs, name):
        return [torch.load(method_runs / f"{name}-{rank}") for rank in range(ENGINES[engine].processes)]

    @pytest.mark.parametrize("way, accumulate", WAYS.items(), ids=WAYS)
    def test_the_training_is_that_of_one_process(self, ranks, name, way, accumulate):
        expected = alone(name, len(ranks), accumulate)
        for rank in ranks:
            assert rank[way]["steps"] == expected["steps"]
            assert_close(rank[way]["after"], expected["after"])
            for found, offsets in zip(rank[way]["offsets"], expected["offsets"], strict=True):
                assert_close(found, offsets)

    @pytest.mark.parametrize("way", WAYS)
    def test_all_processes_have_the_same_offset(self, ranks, way):
        first, *others = (rank[way]["offsets"] for rank in ranks)
        for other in others:
            for one, same in zip(first, other, strict=True):
                assert one.keys() == same.keys() and all(torch.equal(t, same[key]) for key, t in one.items())

    def test_a_resumed_run_ends_with_the_same_bits(self, ranks):
        for rank in ranks:
            whole, resumed = rank["plain"], rank["resumed"]
            assert resumed["steps"] == STEPS
            for kept, again in ((whole["after"], resumed["after"]), (whole["offsets"][-1], resumed["offsets"][-1])):
                assert kept.keys() == again.keys() and all(torch.equal(t, again[key]) for key, t in kept.items())

    def test_no_weight_is_gathered(self, engine, ranks):
        for rank in ranks:
            seen = rank["communicated"]
            assert seen["sizes"] or engine == "hsdp-2x1"  # where each process has whole factors
            assert max(seen["sizes"], default=0) < seen["weight"] / 2 > seen["adapter"]
