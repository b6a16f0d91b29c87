"""The spot check of the study, and the rho that the loss before training would suggest."""

import csv
import math
from dataclasses import replace

import pytest
import torch
from common import tables
from study import comparisons, design, pictures, publish, run, spot_check, strength, tasks, train
from study.arms import BY_NAME


@pytest.fixture
def made(task, tmp_path, monkeypatch):
    """(folder of the results, task): two arms tuned, and tested."""
    task[0].cells[0] = replace(task[0].cells[0], arms=("lora", "flat"), seeds=1)
    for module in (tasks.LOADERS, strength.LOADERS):
        monkeypatch.setitem(module, "text", lambda: task)
    for name in ("lora", "flat"):
        monkeypatch.setitem(BY_NAME, name, replace(BY_NAME[name], grid=BY_NAME[name].grid[1:3]))
    monkeypatch.setattr(spot_check, "STUDY", tmp_path)
    monkeypatch.setattr(strength, "STUDY", tmp_path)
    monkeypatch.setattr(strength, "FILE", tmp_path / "results" / "strength.csv")
    threads = torch.get_num_threads()
    run.main(["--task", "text", "--part", "tuning", "final", "averaged", "--output", str(tmp_path / "results")])
    yield tmp_path / "results", task[0]
    torch.set_num_threads(threads)


def test_runs_made_again_are_the_same_and_a_changed_row_is_found(made):
    folder, _ = made
    file = folder / "text.csv"
    rows = list(csv.DictReader(file.read_text().splitlines()))
    found = spot_check.main(["--rows", str(len(rows))])
    assert {row["part"] for row in found} == {"tuning", "final", "averaged"}
    assert all(float(row["largest relative difference"]) < 1e-6 for row in found)
    assert (folder / "spot_check.csv").exists()
    for row in rows:
        if row["part"] == "final":
            row["nll_books"] = f"{1.01 * float(row['nll_books']):.7g}"
    with open(file, "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    differs = [row for row in spot_check.main(["--rows", str(len(rows))]) if row["part"] == "final"]
    assert all(float(row["largest relative difference"]) == pytest.approx(0.01, rel=0.02) for row in differs)
    assert {row["outcome"] for row in differs} == {"nll_books"}


def test_the_recipe_of_a_row_is_found():
    cell = tasks.Cell("128-clean", 8, 0.0, 4, ("lora",), 2)
    task = tasks.Text("text", [], [], [], [cell], ["movie"])
    recipe = train.Recipe(cell, "lora", 0.003, 0.003, 101)
    row = {name: str(value) for name, value in recipe.key("tuning").items()}
    assert spot_check.find_recipe(task, row, []) == recipe


@pytest.mark.parametrize(
    "tolerance, expected",
    [(0.01, 0.1), (0.04, 0.2), (0.02, math.exp(2 / 3 * math.log(0.1) + 1 / 3 * math.log(0.2))), (1, 0.4), (1e-4, 0.05)],
)
def test_the_largest_rho_within_a_tolerance(tolerance, expected):
    rhos = [0.05, 0.1, 0.2, 0.4]
    assert strength.largest_rho(rhos, [rho**2 for rho in rhos], tolerance) == pytest.approx(expected)


def measured(label, scale, accuracies):
    """A cell in which noise costs scale * rho^2."""
    scores = dict(zip((0.05, 0.1, 0.2, 0.4), ((accuracy, 0.0) for accuracy in accuracies), strict=True))
    return strength.Measured(label, [scale * rho**2 for rho in strength.RHOS], scores)


def test_accuracy_between_the_strengths_that_were_tuned():
    cell = measured("a", 1, [60, 62, 70, 50])
    wanted = {0.01: 60, 0.05: 60, 0.1: 62, math.sqrt(0.1 * 0.2): 66, 0.4: 50, 0.8: 50}
    for rho, accuracy in wanted.items():
        assert cell.accuracy(rho) == pytest.approx(accuracy)


def test_the_rule_is_tested_on_a_cell_that_it_was_not_fitted_on():
    hardy, frail = [60, 61, 62, 65], [60, 50, 40, 30]
    cells = [
        measured("a", 0.1 / 0.4**2, hardy),
        measured("b", 0.1 / 0.4**2, hardy),
        measured("c", 0.1 / 0.05**2, frail),
    ]
    lines = [line.strip("| ").split(" | ") for line in strength.held_out(cells).splitlines()[2:]]
    # a and b are best at 0.4, which 0.1 nats gives; c at 0.05, which 0.1 nats gives too
    assert lines[0] == ["a", "0.1", "0.40", "65.0", "0.05", "60.0", "+5.0"] and lines[1] == ["b", *lines[0][1:]]
    assert lines[2] == ["c", "0.1", "0.05", "60.0", "0.4", "30.0", "+30.0"]
    assert lines[3][0] == "mean" and lines[3][-1] == "+13.3"
    assert len(strength.held_out(cells[:1]).splitlines()) == 2  # there is no other


def test_the_loss_before_training_is_measured_once_per_cell_and_seed(made, monkeypatch, capsys):
    folder, task = made
    monkeypatch.setattr(strength, "CELLS", {"text": task.cells})
    strength.main(["--task", "text", "--table"])
    rows = list(csv.DictReader((folder / "strength.csv").read_text().splitlines()))
    assert len(rows) == len(design.TUNING_SEEDS) * len(strength.RHOS)
    assert all(float(row["low"]) <= float(row["rise"]) <= float(row["high"]) for row in rows)
    rises = [float(row["rise"]) for row in rows if row["seed"] == "100"]
    assert rises[-1] > rises[0]
    line = capsys.readouterr().out.split("\n\n")[-2].splitlines()[-1]
    assert line.startswith("| text `128-clean` |") and line.count("±") == 2
    monkeypatch.setattr(strength, "measure", None)  # nothing is left to measure
    strength.main(["--task", "text"])


def test_only_what_lora_trains_besides_its_adapters_is_trained(task):
    made, _ = task
    model = strength.with_trained_head(made, made.cells[0], 0)
    before = made.base(0, torch.float32)
    merged = model.merge_and_unload()
    differ = {name for name, value in merged.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert differ == {"classifier.weight", "classifier.bias"}


def test_other_seeds_are_compared_as_those_of_the_study_and_together(made, monkeypatch, tmp_path):
    folder, task = made
    rows = comparisons.read(folder / "text.csv")
    monkeypatch.setattr(publish, "CELLS", {"text": task.cells})
    monkeypatch.setattr(publish, "FEWEST", 1)
    monkeypatch.setattr(publish, "QUICKSTART", tmp_path / "quickstart")
    assert len(publish.repeated({"text": rows}).splitlines()) == 2  # no other seeds: no line
    other = [{**row, "part": "quickstart", "seed": "10"} for row in rows if row["part"] == "final"]
    for row in other:
        row["acc_books"] = {"lora": "0.25", "flat": "0.5"}[row["arm"]]
    publish.QUICKSTART.mkdir()
    tables.write_csv(publish.QUICKSTART / "runs.csv", other)
    line = publish.repeated({"text": rows}).splitlines()[2].split(" | ")
    of = {row["arm"]: float(row["acc_books"]) for row in rows if row["part"] == "final" and not row["variant"]}
    here = 100 * (of["flat"] - of["lora"])
    assert line[2].startswith(f"{here:+.1f} [") and line[2].endswith("n = 1")
    assert line[3] == "+25.0 [+25.0, +25.0], n = 1"
    assert line[4].startswith(f"{(here + 25) / 2:+.1f} [") and line[4].endswith("n = 2 |")


def test_a_figure_has_no_empty_panels():
    panel = {"a": torch.tensor([1.0, 2.0])}
    for count, columns in ((1, 1), (4, 4), (5, 3), (7, 4)):
        figure = pictures.plot_differences({f"panel {k}": panel for k in range(count)}, "points")
        assert len(figure.axes) == count and all(ax.lines for ax in figure.axes)
        assert figure.axes[0].get_gridspec().ncols == columns
