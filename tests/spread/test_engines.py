"""DDP, FSDP2, FSDP1 and DeepSpeed in two processes: the training of one process, and noise of each rank's own.

Losses and parameters of one process are met to 1e-5, which is the rounding of sums that are split over processes.
"""

import math

import processes
import pytest
import torch
from spread.engines import ENGINES
from spread.kinds import KINDS
from spread.record import CHECKPOINTING, RHO, STEPS, alone, record

SAME = {"zero": ["zero"], "off": list(CHECKPOINTING), "factors": ["factors"], **{kind: [kind] for kind in KINDS}}
FIRST = {0, 1, 2}  # q, k and v of the first layer: without checkpointing nothing asks for their input's gradient


@pytest.fixture(scope="module", params=ENGINES)
def ranks(request, tmp_path_factory):
    """What the processes have written down."""
    folder, count = tmp_path_factory.mktemp(request.param), ENGINES[request.param].processes
    processes.run(record, request.param, str(folder), processes=count, timeout=240)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.fixture(params=CHECKPOINTING)
def flat(request, ranks):
    return [rank[request.param] for rank in ranks]


@pytest.fixture(params=KINDS)
def kind(request, ranks):
    """Name of a kind of layer, and what came of it; nothing where it is refused (`record.REFUSED`) or not tried."""
    return request.param, [rank[request.param] for rank in ranks if request.param in rank]


def test_rho_0_is_plain_lora_bit_for_bit(ranks):
    for rank in ranks:
        plain, zero = rank["plain"], rank["zero"]
        assert all(torch.equal(a["loss"], b["loss"]) for a, b in zip(plain["steps"], zero["steps"], strict=True))
        assert plain["after"].keys() == zero["after"].keys()
        assert all(torch.equal(p, zero["after"][name]) for name, p in plain["after"].items())


@pytest.mark.parametrize("run, same", SAME.items(), ids=SAME)
def test_the_training_is_that_of_one_process(ranks, run, same):
    """Gradients of all ranks averaged by hand. With noise this sees a wrong norm, key, recompute or step count."""
    expected, _ = alone(run, len(ranks))
    for found in [rank[name]["after"] for rank in ranks for name in same if name in rank]:
        assert found.keys() == expected.keys()
        for name, p in expected.items():
            torch.testing.assert_close(found[name], p.detach(), rtol=1e-5, atol=1e-5, equal_nan=True)  # packed bits


def test_the_noise_moves_the_parameters_by_more_than_the_tolerance(ranks):
    zero, noisy, factors = (ranks[0][name]["after"] for name in ("zero", "off", "factors"))
    for other in (noisy, factors):
        assert max((other[name] - p).abs().max() for name, p in zero.items()) > 1e-3


def test_the_shards_of_the_frozen_weights_are_never_written(ranks):
    for rank in ranks:
        for run in rank.values():
            before, after = run["shards"]
            assert before and all(torch.equal(bits(a), bits(b)) for a, b in zip(before, after, strict=True))


def bits(tensor):
    return tensor.view(torch.uint8)  # four bits that are stored as float32 may be NaN


def test_each_rank_has_noise_of_its_own(flat):
    for steps in zip(*(rank["steps"] for rank in flat), strict=True):
        keys = [{tuple(made["key"]) for made in step["forward"] + step["backward"]} for step in steps]
        assert {len(seen) for seen in keys} == {1} and len(set.union(*keys)) == len(flat)


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


def test_kinds_of_layers_have_the_noise_of_one_process(kind):
    name, ranks = kind
    for rank, found in enumerate(ranks):
        for step, forward in zip(found["steps"], alone(name, len(ranks))[1][rank], strict=True):
            assert forward and len(step["forward"]) == len(forward)
            for made, expected in zip(step["forward"], forward, strict=True):
                assert (made["key"], made["layer"]) == (expected["key"], expected["layer"])
                torch.testing.assert_close(made["row_std"], expected["row_std"], rtol=1e-5, atol=0)
            once = {made["layer"]: made for made in step["forward"]}
            for made in step["backward"]:
                first = once[made["layer"]]
                assert made["key"] == first["key"] and torch.equal(made["row_std"], first["row_std"])


def merged_norms(parameters, scaling=2):
    """||W'_i|| of each adapted layer, in the order of the model."""
    A = ".lora_A.default.weight"
    for name in [name.removesuffix(A) for name in parameters if name.endswith(A)]:
        base, B = parameters[name + ".base_layer.weight"], parameters[name + ".lora_B.default.weight"]
        yield (base.double() + scaling * B.double() @ parameters[name + A].double()).norm(dim=1).float()


def test_optimizer_steps_are_counted(ranks):
    assert {run["counted"] for rank in ranks for name, run in rank.items() if name != "plain"} == {STEPS}
