"""The example that measures the adapters of language_model.py, on a random model of 20k parameters."""

import json

import flatness
import language_model
import pytest
import torch
from common.models import load_model
from helpers import processes

from flatlora import analysis

SMALL = ["--points", "3", "--grid", "3", "--test_samples", "6", "--samples", "2", "--lanczos_steps", "3"]


@pytest.mark.slow
@processes.patient
@pytest.mark.usefixtures("matplotlib")
def test_from_the_adapters_to_the_files_and_the_pictures(arguments, reviews, monkeypatch):
    out, pages = reviews / "out", []
    monkeypatch.setattr(flatness.page, "build", lambda *runs: pages.append(runs) or "page")  # has tests of its own
    language_model.main([*arguments, "--method", "efmlora", "--picture_samples", "0"])
    flatness.main([*arguments, *SMALL, "--only", "loss_line"])
    assert [path.name for path in (out / "efmlora/analysis").iterdir()] == ["loss_line.json"]
    flatness.main([*arguments, *SMALL])
    names = {path.stem for path in (out / "efmlora/analysis").iterdir()}
    assert names == set(flatness.PLOTS)
    kinds = names | {"training", "loss_surface_3d"}
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert figures == {f"{kind}_{theme}" for kind in kinds for theme in ("light", "dark")}
    assert json.loads((out / "flatness.json").read_text())["command"].startswith("python examples/flatness.py --model")
    rows = (out / "flatness.csv").read_text().splitlines()
    assert len(rows) == 1 + len(names)  # each was measured once
    assert pages == [([out / "efmlora"], ["EFMLoRA"])] * 2


def test_the_base_weights_norms_serve_its_adapters_and_its_last_block_is_found(arguments):
    (args,) = language_model.HfArgumentParser(language_model.Arguments).parse_args_into_dataclasses(arguments)
    base = load_model(args.model, torch.float32, torch.device("cpu"))
    norms = analysis.merged_row_norms(base)
    model = language_model.adapt(base, "lora", args)
    assert set(analysis.merged_row_norms(model)) < set(norms)
    last = max(map(flatness.block, norms))
    assert last == 1 and not flatness.is_in_block(last, "lm_head")
    assert sum(flatness.is_in_block(last, name) for name in norms) == 7


def test_a_measurement_that_is_not_there_is_named(arguments, reviews):
    with pytest.raises(ValueError, match=r"only must be some of .*'loss_line'.*, got \['sharpness'\]"):
        flatness.main([*arguments, "--only", "sharpness"])
    with pytest.raises(FileNotFoundError, match="must hold what language_model.py saved"):
        flatness.main(arguments)
