"""The error for a wrong argument has its name, what it must be, and its value."""

import inspect
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.arguments import CASES, COUNT, KEY, RESULTS, STD, VALUES, W, flat, hessian, loss

import flatlora
from flatlora import analysis, methods, ops, plotting, report
from flatlora.utils import arguments

ARGUMENTS = [(name, argument) for name, (_, kinds) in CASES.items() for argument in kinds]


def came(value):
    """How a message may show a value: the value, its type or shape, or the wrong part."""
    found = [arguments.shown(value), f"got {type(value).__name__}", f"of type {type(value).__name__}"]
    if isinstance(value, (list, tuple, set, dict, bytearray)):
        parts = value.values() if isinstance(value, dict) else value
        found += [arguments.shown(list(value)), *map(arguments.shown, parts)]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        listed = [] if value.size == 0 or value.shape == (0,) else None
        found += [f"got {tuple(value.shape)}", f"shape {tuple(value.shape)}", f"got {value.dtype}", f"got {listed}"]
    return found


@pytest.mark.parametrize("name, argument", ARGUMENTS, ids=[f"{n}({a})" for n, a in ARGUMENTS])
def test_a_wrong_value_is_answered(name, argument):
    call, kinds = CASES[name]
    right = kinds[argument].split()
    assert set(right) <= VALUES.keys()
    answers = {key: answer(call, argument, value) for key, value in VALUES.items() if key not in right}
    bad = {key: said for key, said in answers.items() if said}
    assert len(answers) >= 30 and not bad, "\n".join(f"{key}: {said}" for key, said in bad.items())


def answer(call, argument, value):
    """What is wrong with the error for this value, if anything."""
    try:
        call(**{argument: value})
    except (ValueError, TypeError) as error:
        said = str(error)
        told = re.search(rf"\b{argument}\b.* must (be|have|hold) |\b{argument}\b.*must be", said)
        return "" if told and any(text in said for text in came(value)) else f"{type(error).__name__}: {said}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def test_no_public_name_is_forgotten():
    rooms = {"": flatlora, "analysis": analysis, "plotting": plotting, "ops": ops}
    public = {f"{room}.{name}".strip(".") for room, module in rooms.items() for name in module.__all__}
    public |= {f"report.{name}" for name, value in vars(report).items() if is_own(value) and name[0] != "_"}
    assert set(methods.__all__) - {"Method", "WeightNoise", "FactorOffset"} <= set(flatlora.__all__)
    # a class that `perturbation` returns, and a dict
    tested_with_their_operators = {f"ops.{name}" for name in ("adapted_linear", "dora_linear", "Branch")}
    tested_with_their_operators |= {"ops.FourBitWeight", "ops.DoubleScales"}
    assert public - CASES.keys() == {"Perturbation", "ops.BACKENDS", *tested_with_their_operators}


def is_own(value):
    return inspect.isfunction(value) and value.__module__ == report.__name__


def scalars(value):
    """One number in every type that is accepted."""
    array = np.array(value)
    return [value, array, array[()], torch.tensor(value), *([] if isinstance(value, bool) else [np.float32(value)])]


@pytest.mark.parametrize("half", [0.5, *scalars(0.5)[1:], Fraction(1, 2)], ids=repr)
def test_numbers_of_any_kind_are_taken(half):
    config = flatlora.EFMLoraConfig(rho=half, rtol=half, beta=half)
    assert [(type(x), x) for x in (config.rho, config.rtol, config.beta)] == [(float, 0.5)] * 3
    state = flatlora.perturbation(flat())
    state.progress = half
    assert state.progress == 0.5
    model, batches = torch.nn.Linear(2, 2), [torch.ones(1, 2)]
    found = analysis.expected_sharpness(model, loss, batches, rho=half, samples=2)
    assert found.rho.tolist() == [0.5]
    assert ops.perturb_weight(W, STD, KEY, 0, relative=half).equal(ops.perturb_weight(W, STD, KEY, 0, relative=0.5))


@pytest.mark.parametrize("two", [2, np.array(2), np.int32(2), np.uint8(2), np.int64(2), torch.tensor(2)], ids=repr)
def test_integers_of_any_kind_are_taken(two):
    config = flatlora.BiLoraConfig(ascent_r=two, seed=two, total_steps=two)
    assert [(type(x), x) for x in (config.ascent_r, config.seed, config.total_steps)] == [(int, 2)] * 3
    callbacks = [
        flatlora.FlatLoraCallback(sharpness_steps=count, sharpness_batches=[1], sharpness_samples=count)
        for count in (two, 2)
    ]
    assert vars(callbacks[0]) == vars(callbacks[1])
    assert {type(value) for value in vars(callbacks[0]).values()} <= {
        type(value) for value in vars(callbacks[1]).values()
    }
    assert analysis.trace(hessian(), samples=two, seed=two).samples.shape == (2,)
    state = flatlora.perturbation(flat())
    state.sample = state.seed = two
    assert (type(state.sample), state.sample, state.seed) == (int, 2, 2)
    assert ops.perturb_weight(W, STD, KEY, two).equal(ops.perturb_weight(W, STD, KEY, 2))


@pytest.mark.parametrize("huge", [10**400, -(10**400), 2**63])
def test_an_integer_of_400_digits_is_refused_wherever_a_count_is_asked_for(huge):
    counts = [(name, argument) for name, (_, kinds) in CASES.items() for argument in kinds if COUNT in kinds[argument]]
    asked = [(name, argument) for name, argument in counts if kinds_of(name, argument) <= {"None", COUNT}]
    assert {("BiLoraConfig", "ascent_r"), ("FlatLoraCallback", "sharpness_steps")} <= set(asked)
    for name, argument in asked:
        with pytest.raises(ValueError, match=rf"\b{argument} must be "):
            CASES[name][0](**{argument: huge})


def kinds_of(name, argument):
    return set(CASES[name][1][argument].split())


@pytest.mark.parametrize("yes", scalars(True), ids=repr)
def test_truths_of_numpy_and_torch_are_taken(yes):
    state = flatlora.perturbation(flat())
    state.enabled = yes
    assert state.enabled is True
    assert plotting.plot_loss_line({"a": RESULTS[analysis.LossLine]}, relative=yes).axes


def test_paths_layers_and_batches_of_any_kind_are_taken(tmp_path):
    analysis.save(RESULTS[analysis.LossLine], tmp_path / "line.json")
    assert analysis.load(str(tmp_path / "line.json")).noise == analysis.load(tmp_path / "line.json").noise
    model, batches = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.ones(3, 1, 2)
    lines = [
        analysis.loss_line(model, loss, given(batches), layers=layers, distances=distances, directions=1).losses
        for given in (torch.clone, list, tuple, iter, lambda batches: (batch for batch in batches))
        for layers in (None, "all", lambda name: name == "0")
        for distances in ([0.5, 1], (0.5, 1.0), np.array([0.5, 1]), torch.tensor([0.5, 1]))
    ]
    assert all(torch.equal(line, lines[0]) for line in lines)
