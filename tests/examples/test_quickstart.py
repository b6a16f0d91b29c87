"""The quickstart, on the tiny task of the study."""

import csv
import re
from types import SimpleNamespace

import pytest
import quickstart
import torch
import transformers
from peft import PeftModel
from study import comparisons, images, stats


@pytest.fixture
def arguments(task, tmp_path, monkeypatch):
    """Of the command line: two seeds on the tiny task."""
    monkeypatch.setattr(quickstart, "load", lambda name: task)
    verbosity = transformers.utils.logging.get_verbosity()
    yield ["--seeds", "0", "1", "--lr", "0.01", "--strength", "flat=0.2", "--output_dir", str(tmp_path / "out")]
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


def rows_of(tmp_path):
    with open(tmp_path / "out" / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("matplotlib")
def test_runs_both_methods_and_shows_the_paired_difference(arguments, task, tmp_path, capsys):
    lines = quickstart.main(arguments)
    rows, out = rows_of(tmp_path), tmp_path / "out"
    assert [(row["arm"], row["seed"], row["strength"]) for row in rows] == [
        *(("lora", "0", "0.01"), ("flat", "0", "0.2"), ("lora", "1", "0.01"), ("flat", "1", "0.2")),
    ]
    of = {(row["arm"], row["seed"]): float(row["nll_books"]) for row in rows}
    d = torch.tensor([of["flat", seed] - of["lora", seed] for seed in "01"], dtype=torch.float64)
    low, high = stats.bootstrap_interval(d)
    (line,) = [line for line in lines if line[0].startswith("NLL out of domain") and line[1] == "Flat-LoRA"]
    assert line[3] == f"{d.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    assert "minus LoRA [95 % interval]" in capsys.readouterr().out
    for name in ("differences_light.png", "differences_dark.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert line[3] in (out / "report.html").read_text() and "data:image/svg" in (out / "report.html").read_text()
    assert all(row["commit"] and row["machine"] and row["command"].endswith(str(out)) for row in rows)


@pytest.mark.usefixtures("matplotlib")
def test_a_saved_adapter_answers_as_the_row_says_with_stock_peft(arguments, task, tmp_path):
    quickstart.main(arguments)
    made, tests = task
    row = next(row for row in rows_of(tmp_path) if (row["arm"], row["seed"]) == ("flat", "1"))
    model = PeftModel.from_pretrained(made.base(1, made.dtype), tmp_path / "out" / "flat-seed1")
    merged = model.float().merge_and_unload().eval().to(made.dtype)
    assert made.measure(merged, tests["books"])["nll"] == pytest.approx(float(row["nll_books"]), abs=1e-6)


@pytest.mark.usefixtures("matplotlib")
def test_an_interrupted_comparison_goes_on(arguments, tmp_path, monkeypatch):
    calls, run = [], quickstart.run

    def counted(*given):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(given)
        return run(*given)

    monkeypatch.setattr(quickstart, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        quickstart.main(arguments)
    before = rows_of(tmp_path)
    monkeypatch.setattr(quickstart, "run", run)
    quickstart.main(arguments)
    assert rows_of(tmp_path)[:2] == before and len(rows_of(tmp_path)) == 4
    monkeypatch.setattr(quickstart, "run", None)  # nothing is left to run
    quickstart.main(arguments)


def test_other_settings_are_other_runs(task, arguments):
    (args,) = quickstart.HfArgumentParser(quickstart.Arguments).parse_args_into_dataclasses(
        [*arguments, "--steps", "3", "--samples", "6"]
    )
    cell = quickstart.pick_cell(args, task[0])
    assert (cell.steps, cell.samples) == (3, 6)
    recipes = quickstart.recipes(args, cell)
    assert {name: (r.strength, r.lr) for name, r in recipes.items()} == {"lora": (0.01, 0.01), "flat": (0.2, 0.01)}


def test_the_defaults_are_what_the_study_chose():
    (args,) = quickstart.HfArgumentParser(quickstart.Arguments).parse_args_into_dataclasses([])
    cell = quickstart.pick_cell(args, SimpleNamespace(cells=images.IMAGE_CELLS))
    assert (args.task, cell.name) == ("image", quickstart.CLEAREST)
    assert not set(args.seeds) & set(range(cell.seeds))  # none of those that chose the setting
    rows = comparisons.read(quickstart.STUDY / "image.csv")
    recipes = quickstart.recipes(args, cell)
    for name, recipe in recipes.items():
        assert (recipe.strength, recipe.lr) == quickstart.design.tuned(cell, quickstart.BY_NAME[name], rows)


@pytest.mark.parametrize(
    "options, match",
    [
        (["--arms", "lora", "tlora"], "--arms must be of lora, .* got tlora"),
        (["--arms", "lora", "lora"], "--arms must be different ones"),
        (["--seeds", "1", "1"], "--seeds must be different ones"),
        (["--strength", "rwp=0.1"], "an arm of --arms, got rwp"),
        (["--strength", "lora=1"], "the strength of lora is the learning rate: give --lr"),
        (["--arms", "rwp"], "has not tuned rwp in 128-clean: give --lr"),
        (["--arms", "rwp", "--lr", "1e-3"], "has not tuned rwp in 128-clean: give --strength rwp=VALUE"),
        (["--cell", "x"], "--cell must be one of 128-clean, got x"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, match, monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "STUDY", tmp_path)  # nothing is tuned
    (args,) = quickstart.HfArgumentParser(quickstart.Arguments).parse_args_into_dataclasses([*arguments[:3], *options])
    task, _ = quickstart.load("text")
    with pytest.raises(ValueError, match=re.compile(match)):
        quickstart.recipes(args, quickstart.pick_cell(args, task))
