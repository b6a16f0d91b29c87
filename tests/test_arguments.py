"""Every public function answers a wrong argument with its name, what it must be, and what came."""

import re

import numpy as np
import pytest
import torch
from argument_cases import CASES, VALUES

import flatlora
from flatlora import analysis, arguments, methods, ops, plotting

ARGUMENTS = [(name, argument) for name, (_, kinds) in CASES.items() for argument in kinds]


def came(value):
    """How a message may show a value: itself, its type or shape, or the part of it that is wrong."""
    found = [arguments.shown(value), f"got {type(value).__name__}", f"of type {type(value).__name__}"]
    if isinstance(value, (list, tuple, set, dict, bytearray)):
        parts = value.values() if isinstance(value, dict) else value
        found += [arguments.shown(list(value)), *map(arguments.shown, parts)]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        listed = [] if value.size == 0 or value.shape == (0,) else None
        found += [f"got {tuple(value.shape)}", f"shape {tuple(value.shape)}", f"got {value.dtype}", f"got {listed}"]
    return found


@pytest.mark.parametrize("name, argument", ARGUMENTS, ids=[f"{n.removeprefix('flatlora.')}({a})" for n, a in ARGUMENTS])
def test_a_wrong_value_is_answered(name, argument):
    call, kinds = CASES[name]
    right = kinds[argument].split()
    assert set(right) <= VALUES.keys()
    answers = {key: answer(call, argument, value) for key, value in VALUES.items() if key not in right}
    bad = {key: said for key, said in answers.items() if said}
    assert len(answers) >= 30 and not bad, "\n".join(f"{key}: {said}" for key, said in bad.items())


def answer(call, argument, value):
    """What is wrong with the answer to this value, if anything."""
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
    rooms = {"flatlora": flatlora, "flatlora.analysis": analysis, "flatlora.plotting": plotting, "flatlora.ops": ops}
    public = {f"{room}.{name}" for room, module in rooms.items() for name in module.__all__} - {"flatlora.ops.BACKENDS"}
    assert set(methods.__all__) <= set(flatlora.__all__)
    assert {"flatlora.report.build", "flatlora.report.main"} | public <= CASES.keys()
