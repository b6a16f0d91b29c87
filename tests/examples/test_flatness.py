"""The example that measures the quickstart's adapters, on a random model of 20k parameters."""

import json

import flatness
import quickstart
import torch
from models import load_model

from flatlora import analysis

SMALL = ["--points", "3", "--grid", "3", "--test_samples", "6", "--samples", "2", "--lanczos_steps", "3"]


def test_from_the_adapters_to_the_page_and_the_pictures(arguments, reviews, monkeypatch):
    out = reviews / "out"
    quickstart.main([*arguments, "--method", "all", "--picture_samples", "0"])
    flatness.main([*arguments, *SMALL])
    page = (out / "report.html").read_text()
    names = {path.stem for path in (out / "lora/analysis").iterdir()}
    assert len(names) == 10
    for method in ("lora", "flat", "efmlora"):
        assert {path.stem for path in (out / method / "analysis").iterdir()} == names
        assert flatness.LABELS[method] in page
    figures = {path.stem for path in (out / "figures").iterdir()}
    kinds = names | {"training", "loss_surface_3d"}
    assert figures == {f"{kind}_{theme}" for kind in kinds for theme in ("light", "dark")}
    assert json.loads((out / "flatness.json").read_text())["command"].startswith("python examples/flatness.py --model")
    rows = (out / "flatness.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 10
    for name in ("draw", "measurements"):  # all is there: nothing is measured again
        monkeypatch.setattr(flatness, name, lambda *_: dict.fromkeys(names))
    flatness.main([*arguments, *SMALL])
    assert (out / "report.html").read_text() == page


def test_the_base_weights_norms_serve_its_adapters_and_its_last_block_is_found(arguments):
    (args,) = quickstart.HfArgumentParser(quickstart.Arguments).parse_args_into_dataclasses(arguments)
    base = load_model(args.model, torch.float32, torch.device("cpu"))
    norms = analysis.merged_row_norms(base)
    model = quickstart.adapt(base, "lora", args)
    assert set(analysis.merged_row_norms(model)) < set(norms)
    last = max(map(flatness.block, norms))
    assert last == 1 and not flatness.is_in_block(last, "lm_head")
    assert sum(flatness.is_in_block(last, name) for name in norms) == 7
