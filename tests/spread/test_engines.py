"""DDP, FSDP2, FSDP1 and DeepSpeed in two processes: the training of one process, and noise of each rank's own.

Losses and parameters of one process are met to 1e-5, which is the rounding of sums that are split over processes.
"""

import math

import processes
import pytest
import torch
from spread.engines import ENGINES
from spread.record import CHECKPOINTING, RHO, STEPS, alone, record

FIRST = {0, 1, 2}  # q, k and v of the first layer: without checkpointing nothing asks for their input's gradient


@pytest.fixture(scope="module", params=ENGINES)
def ranks(request, tmp_path_factory):
    """What both processes have written down."""
    folder = tmp_path_factory.mktemp(request.param)
    processes.run(record, request.param, str(folder), timeout=240)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(params=CHECKPOINTING)
def flat(request, ranks):
    return [rank[request.param] for rank in ranks]


def test_rho_0_is_plain_lora_bit_for_bit(ranks):
    for rank in ranks:
        plain, zero = rank["plain"], rank["zero"]
        assert all(torch.equal(a["loss"], b["loss"]) for a, b in zip(plain["steps"], zero["steps"], strict=True))
        assert plain["after"].keys() == zero["after"].keys()
        assert all(torch.equal(p, zero["after"][name]) for name, p in plain["after"].items())


@pytest.mark.parametrize("run, same", [("zero", ["zero"]), ("off", list(CHECKPOINTING)), ("factors", ["factors"])])
def test_the_training_is_that_of_one_process(ranks, run, same):
    """Gradients of both ranks averaged by hand. With noise this sees a wrong norm, key, recompute or step count."""
    expected = alone(run)
    for found in [rank[name]["after"] for rank in ranks for name in same]:
        assert found.keys() == expected.keys()
        for name, p in expected.items():
            torch.testing.assert_close(found[name], p.detach(), rtol=1e-5, atol=1e-5)


def test_the_noise_moves_the_parameters_by_more_than_the_tolerance(ranks):
    zero, noisy, factors = (ranks[0][name]["after"] for name in ("zero", "off", "factors"))
    for other in (noisy, factors):
        assert max((other[name] - p).abs().max() for name, p in zero.items()) > 1e-3


def test_the_shards_of_the_frozen_weights_are_never_written(ranks):
    for rank in ranks:
        for run in rank.values():
            before, after = run["shards"]
            assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_each_rank_has_noise_of_its_own(flat):
    for first, second in zip(flat[0]["steps"], flat[1]["steps"], strict=True):
        keys = [{tuple(made["key"]) for made in step["forward"] + step["backward"]} for step in (first, second)]
        assert [len(seen) for seen in keys] == [1, 1] and keys[0] != keys[1]


def test_recompute_and_backward_have_the_noise_of_the_forward(flat):
    for rank in flat:
        for step in rank["steps"]:
            forward = {made["layer"]: made for made in step["forward"]}
            assert len(forward) == len(step["forward"])
            assert {made["layer"] for made in step["backward"]} >= forward.keys() - FIRST
            for made in step["backward"]:
                first = forward[made["layer"]]
                assert made["key"] == first["key"]
                assert torch.equal(made["row_std"], first["row_std"]) and torch.equal(made["weight"], first["weight"])


def test_row_norms_are_those_of_the_merged_weight(flat):
    for rank in flat:
        for t, step in enumerate(rank["steps"]):
            norms = merged_norms(step["before"])
            for made, norm in zip(step["forward"], norms, strict=True):
                expected = RHO * t / STEPS / math.sqrt(made["weight"].shape[1]) * norm
                torch.testing.assert_close(made["row_std"], expected, rtol=1e-5, atol=0)


def merged_norms(parameters, scaling=2):
    """||W'_i|| of each adapted layer, in the order of the model."""
    A = ".lora_A.default.weight"
    for name in [name.removesuffix(A) for name in parameters if name.endswith(A)]:
        base, B = parameters[name + ".base_layer.weight"], parameters[name + ".lora_B.default.weight"]
        yield (base.double() + scaling * B.double() @ parameters[name + A].double()).norm(dim=1).float()


def test_optimizer_steps_are_counted(ranks):
    assert {run["counted"] for rank in ranks for name, run in rank.items() if name != "plain"} == {STEPS}
