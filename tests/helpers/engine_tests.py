"""Tests of an engine: it trains as one process does, and each rank has its own noise.

A file of tests derives a class and names its engines. Losses and parameters of one process are met to 1e-5, which is
the rounding of sums that are split over processes.
"""

import math

import pytest
import torch

from helpers import processes
from helpers.engine_runs import CHECKPOINTING, REFUSED, RHO, STEPS, alone
from helpers.engines import ENGINES

SAME = {"zero": ["zero"], "off": list(CHECKPOINTING), "factors": ["factors"]}
FIRST = {0, 1, 2}  # q, k and v of the first layer: without checkpointing their input needs no gradient


def assert_same_parameters(found, expected):
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        torch.testing.assert_close(
            found[name], p.detach(), rtol=1e-5, atol=1e-5, equal_nan=True
        )  # 4-bit data that is stored as float32


def bits(tensor):
    return tensor.view(torch.uint8)  # 4-bit data that is stored as float32 may be NaN


def assert_same_noise(found, expected, strength=True):
    assert expected and len(found) == len(expected)
    for made, once in zip(found, expected, strict=True):
        assert (made["key"], made["layer"]) == (once["key"], once["layer"])
        if strength:
            torch.testing.assert_close(made["row_std"], once["row_std"], rtol=1e-5, atol=0)


def merged_norms(parameters, scaling=2):
    """||W'_i|| of each adapted layer, in the order of the model."""
    A = ".lora_A.default.weight"
    for name in [name.removesuffix(A) for name in parameters if name.endswith(A)]:
        base, B = parameters[name + ".base_layer.weight"], parameters[name + ".lora_B.default.weight"]
        yield (base.double() + scaling * B.double() @ parameters[name + A].double()).norm(dim=1).float()


class KindTests:
    """Kinds of layers beside the plain linear one."""

    pytestmark = [processes.patient, pytest.mark.slow]
    engines = ()
    four_bit = False  # test the 4-bit models, or all others

    def pytest_generate_tests(self, metafunc):
        if "engine" in metafunc.fixturenames:
            all_engines = "kinds" not in metafunc.fixturenames
            engines = [engine for engine in self.engines if all_engines or self.kinds_of(engine)]
            metafunc.parametrize("engine", engines, scope="class")

    def kinds_of(self, engine):
        """Names of the models that this engine trains as one process does."""
        kinds = [kind for kind in ENGINES[engine].kinds if (engine, kind) not in REFUSED]
        return [kind for kind in kinds if ("4-bit" in kind) == self.four_bit]

    @pytest.fixture
    def kinds(self, engine):
        return self.kinds_of(engine)

    def test_the_shards_of_the_frozen_weights_are_never_written(self, ranks):
        for rank in ranks:
            for run in rank.values():
                before, after = run["shards"]
                assert before and all(torch.equal(bits(a), bits(b)) for a, b in zip(before, after, strict=True))

    def test_kinds_of_layers_are_trained_as_in_one_process(self, ranks, kinds):
        for kind in kinds:
            expected, forwards = alone(kind, len(ranks))
            for rank, forward in zip(ranks, forwards, strict=True):
                assert_same_parameters(rank[kind]["after"], expected)
                for step, noise in zip(rank[kind]["steps"], forward, strict=True):
                    assert_same_noise(step["forward"], noise)
                    once = {made["layer"]: made for made in noise}
                    # the backward of DoRA has eps / g, which the parameters after the steps show
                    strength = "dora" not in kind
                    assert_same_noise(step["backward"], [once[made["layer"]] for made in step["backward"]], strength)

    def test_optimizer_steps_are_counted(self, ranks):
        assert {run["counted"] for rank in ranks for name, run in rank.items() if name != "plain"} == {STEPS}


class EngineTests(KindTests):
    """The same Llama with plain LoRA, with rho = 0, with noise in W and in the factors, and with checkpointing."""

    @pytest.fixture(params=CHECKPOINTING)
    def flat(self, request, ranks):
        return [rank[request.param] for rank in ranks]

    def test_rho_0_is_plain_lora_bit_for_bit(self, ranks):
        for rank in ranks:
            plain, zero = rank["plain"], rank["zero"]
            assert all(torch.equal(a["loss"], b["loss"]) for a, b in zip(plain["steps"], zero["steps"], strict=True))
            assert plain["after"].keys() == zero["after"].keys()
            assert all(torch.equal(p, zero["after"][name]) for name, p in plain["after"].items())

    @pytest.mark.parametrize("run, same", SAME.items(), ids=SAME)
    def test_the_training_is_that_of_one_process(self, ranks, run, same):
        """A wrong norm, key, recompute or step count changes the parameters."""
        expected, _ = alone(run, len(ranks))
        for found in [rank[name]["after"] for rank in ranks for name in same]:
            assert_same_parameters(found, expected)

    def test_the_noise_moves_the_parameters_by_more_than_the_tolerance(self, ranks):
        zero, noisy, factors = (ranks[0][name]["after"] for name in ("zero", "off", "factors"))
        for other in (noisy, factors):
            assert max((other[name] - p).abs().max() for name, p in zero.items()) > 1e-3

    def test_each_rank_has_noise_of_its_own(self, flat):
        for steps in zip(*(rank["steps"] for rank in flat), strict=True):
            keys = [{tuple(made["key"]) for made in step["forward"] + step["backward"]} for step in steps]
            assert {len(seen) for seen in keys} == {1} and len(set.union(*keys)) == len(flat)

    def test_recompute_and_backward_have_the_noise_of_the_forward(self, flat):
        for rank in flat:
            for step in rank["steps"]:
                forward = {made["layer"]: made for made in step["forward"]}
                assert len(forward) == len(step["forward"])
                assert {made["layer"] for made in step["backward"]} >= forward.keys() - FIRST
                for made in step["backward"]:
                    first = forward[made["layer"]]
                    assert made["key"] == first["key"]
                    assert torch.equal(made["row_std"], first["row_std"]) and torch.equal(
                        made["weight"], first["weight"]
                    )

    def test_row_norms_are_those_of_the_merged_weight(self, flat):
        for rank in flat:
            for t, step in enumerate(rank["steps"]):
                norms = merged_norms(step["before"])
                for made, norm in zip(step["forward"], norms, strict=True):
                    expected = RHO * t / STEPS / math.sqrt(made["weight"].shape[1]) * norm
                    torch.testing.assert_close(made["row_std"], expected, rtol=1e-5, atol=0)
