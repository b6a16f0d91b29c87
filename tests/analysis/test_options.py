"""The options that the measurements along random directions share."""

import inspect
from dataclasses import fields

import pytest
import torch
from helpers.landscapes import Quadratic, value

from flatlora import analysis
from flatlora.analysis import LossLine, load, loss_line, save
from flatlora.analysis.options import OptionKeywords, Options

MEASUREMENTS = ["loss_line", "loss_surface", "expected_sharpness", "under_weight_noise"]


def test_type_checkers_see_the_same_options():
    assert list(OptionKeywords.__annotations__) == [field.name for field in fields(Options)]


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_signatures_list_every_option_with_its_default(name):
    parameters = inspect.signature(getattr(analysis, name)).parameters
    assert {f.name: f.default for f in fields(Options)}.items() <= {k: p.default for k, p in parameters.items()}.items()
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_an_unknown_option_is_answered_with_similar_ones(name):
    model = Quadratic()
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'spaces'; did you mean space"):
        getattr(analysis, name)(model, value, model.batches, spaces="merged")


def test_the_former_spelling_of_a_noise_is_accepted(tmp_path):
    model, file = Quadratic(), tmp_path / "journal"
    lines = [
        loss_line(model, value, model.batches, noise=noise, file=file, directions=1)
        for noise in ("filter_normalised", "filter_normalized")
    ]
    assert torch.equal(lines[0].losses, lines[1].losses)
    old = LossLine(lines[0].distances, lines[0].losses, lines[0].center, "filter_normalised", "merged", 0)
    save(old, tmp_path / "line.json")
    path = tmp_path / "line.json"
    path.write_text(path.read_text().replace("normalized", "normalised"))
    assert {line.noise for line in (*lines, old, load(path))} == {"filter_normalized"}
