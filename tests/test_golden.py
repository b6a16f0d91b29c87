"""Compare 20 steps of every kind of layer and method with `golden.json`, which was written before the last change."""

import json

import golden
import pytest

CASES = golden.cases()
SAVED = json.loads(golden.FILE.read_text())
TOLERANCE = {"float64": 1e-6, "float32": 2e-2, "bfloat16": 0.25}  # of another processor after 20 steps of AdamW


def test_every_case_is_in_the_file():
    assert CASES.keys() == SAVED["cases"].keys()


@pytest.mark.parametrize("name", CASES)
def test_losses_and_parameters(name):
    if name in golden.PACKAGES:
        pytest.importorskip(golden.PACKAGES[name])
    dtype, case = CASES[name]
    found, saved = golden.run(case), SAVED["cases"][name]
    assert found["losses"] == pytest.approx(saved["losses"], rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
    assert found["norm"] == pytest.approx(saved["norm"], rel=TOLERANCE[dtype])
    if SAVED["machine"] == golden.machine():
        assert found["bits"] == saved["bits"]
