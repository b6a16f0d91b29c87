"""The estimates of the recipes with language models at the papers' sizes."""

import importlib

import pytest

pytest.importorskip("datasets")
pytest.importorskip("trl")

pytestmark = [pytest.mark.slow, pytest.mark.thorough]


@pytest.mark.parametrize(
    "recipe, more, weights",  # GB of the weights in bf16
    [
        ("code_generation", [], 2 * 6.738),
        ("mathematics", [], 2 * 6.738),
        ("dialogue", ["--task", "mt_bench"], 2 * 6.738),
        ("dialogue", ["--task", "instruct_eval"], 2 * 8.030),
        ("data_to_text", [], 4 * 0.3548),
    ],
)
def test_an_estimate_is_printed_and_nothing_is_run(recipe, more, weights, capsys):
    module = importlib.import_module(recipe)
    assert module.main(["--paper", "--estimate", *more]) == []
    text = capsys.readouterr().out
    assert "Computed, not measured, for one A100 of 80 GB" in text
    found = float(text.partition("(weights ")[2].partition(",")[0])
    assert found == pytest.approx(weights * 1e9 / 2**30, abs=0.06)
