"""The study, end to end on a BERT of 10k parameters."""

import csv
import itertools
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers import processes

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from study import comparisons, design, outcomes, pictures, publish, records, report, run, stats, tasks, train  # noqa: E402
from study.arms import ARMS, BY_NAME  # noqa: E402

import flatlora  # noqa: E402

UNLIKE = ("seconds", "train_seconds", "finished", "command")  # columns that differ between two equal runs
SOME = ("lora", "smoothing", "early-stopping", "average", "flat")


@pytest.fixture(autouse=True)
def settings():
    """`run.main` sets threads and silence for its own process; other tests must not keep them."""
    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def study(task, tmp_path, monkeypatch):
    """Run the study on the tiny task with two strengths for each arm. Returns (whether it ended, its rows)."""
    monkeypatch.setitem(tasks.LOADERS, "text", lambda: task)
    for name in SOME:
        monkeypatch.setitem(BY_NAME, name, replace(BY_NAME[name], grid=BY_NAME[name].grid[1:3]))

    def study(name, *arguments):
        done = run.main(["--task", "text", *arguments, "--output", str(tmp_path / name)])
        return done, read(tmp_path / name / "text.csv")

    return study


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def alike(rows):
    """Key -> the row without the columns that differ between two equal runs."""
    found = {records.key(row): {k: v for k, v in row.items() if k not in UNLIKE} for row in rows}
    assert len(found) == len(rows)  # no run twice
    return found


def first(arm):
    return arm.grid[0] if arm.grid else 0.1


# --- runs


def test_tunes_then_measures_every_arm_at_what_was_chosen(study, task):
    done, rows = study("one", "--part", "tuning", "final")
    assert done and all(row["status"] == "ok" for row in rows)
    assert {row["command"].split()[1] for row in rows} == {"examples/study/run.py"}
    cell = task[0].cells[0]
    count = {part: sum(row["part"] == part for row in rows) for part in ("tuning", "final")}
    assert count == {"tuning": 5 * 2 * 2, "final": 5 * 2} == {k: design.planned(cell)[k] for k in count}
    for row in rows:
        if row["part"] == "final":
            assert (float(row["strength"]), float(row["lr"])) == design.tuned(cell, BY_NAME[row["arm"]], rows)
            assert row["acc_movie"] and row["nll_books"] and row["sharpness"] and not row["acc_validation"]
            assert bool(row["eigenvalue"]) == (row["arm"] in ("lora", "flat"))
        else:
            assert row["acc_validation"] and not row["acc_movie"]


@pytest.mark.slow
def test_sigterm_in_a_run_then_resume_gives_the_same_rows(study, monkeypatch):
    _, whole = study("whole", "--part", "tuning", "final", "--skip", "average", "early-stopping")
    step, steps = train.Loop.step, itertools.count()

    def interrupted(self, batch):
        if next(steps) in (18, 55):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(train.Loop, "step", interrupted)
    arguments = ("torn", "--part", "tuning", "final", "--skip", "average", "early-stopping")
    lengths = [0]
    for ends in (False, False, True):
        done, rows = study(*arguments)
        assert done == ends and len(rows) > lengths[-1]
        lengths.append(len(rows))
    assert alike(rows) == alike(whole)
    assert study(*arguments)[1] == rows  # nothing is made again


DRIVER = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
from study import run, tasks
task, arms = pickle.load(open(sys.argv[2], "rb"))
run.BY_NAME.update(arms)
tasks.LOADERS["text"] = lambda: task
run.main(["--task", "text", "--part", "tuning", "--output", sys.argv[3]])
"""


@pytest.mark.slow
@processes.patient
def test_sigkill_then_resume_gives_the_same_rows(study, task, tmp_path):
    _, whole = study("whole", "--part", "tuning")
    pickled, csv_file = tmp_path / "task.pickle", tmp_path / "killed" / "text.csv"
    pickled.write_bytes(pickle.dumps((task, BY_NAME)))
    command = [sys.executable, "-c", DRIVER, str(EXAMPLES), str(pickled), str(csv_file.parent)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = processes.deadline(120)
        while not (csv_file.exists() and csv_file.read_bytes().count(b"\n") > 3):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert 3 <= len(read(csv_file)) < len(whole)
    _, rows = study("killed", "--part", "tuning")
    assert alike(rows) == alike(whole)


class Untouchable(list):
    def _touched(self, *_):
        raise AssertionError("a test split was touched")

    __iter__ = __getitem__ = __len__ = _touched


@pytest.mark.slow
def test_tuning_touches_no_test(study, task):
    for name, examples in task[1].items():
        task[1][name] = Untouchable(examples)
    _, rows = study("one", "--part", "tuning")
    assert {row["status"] for row in rows} == {"ok"}
    _, rows = study("one", "--part", "final")  # does touch them, and a failed run leaves its row
    errors = [row["error"] for row in rows if row["part"] == "final"]
    assert errors == ["AssertionError: a test split was touched"] * 10


def test_a_failed_run_leaves_its_error_and_the_study_goes_on(study, monkeypatch):
    grid = (1e30, 1e-3)  # the first of which ends in a loss that is no number
    monkeypatch.setitem(BY_NAME, "lora", replace(BY_NAME["lora"], grid=grid))
    done, rows = study("one", "--part", "tuning", "final", "--skip", *SOME[1:])
    failed = [row for row in rows if row["status"] == "failed"]
    assert done and [(row["part"], float(row["lr"])) for row in failed] == [("tuning", 1e30)] * 2
    assert all(row["error"].startswith("FloatingPointError: the loss of step") for row in failed)
    assert [float(row["lr"]) for row in rows if row["part"] == "final"] == [1e-3] * 2


@pytest.mark.slow
def test_an_arm_whose_trials_all_failed_has_no_final_runs(study, task, monkeypatch):
    monkeypatch.setitem(BY_NAME, "flat", replace(BY_NAME["flat"], grid=(-1.0, -2.0)))  # which the configuration refuses
    done, rows = study("one", "--part", "tuning", "final")
    assert done and {row["arm"] for row in rows if row["part"] == "final"} == set(SOME) - {"flat"}
    assert {row["status"] for row in rows if row["arm"] == "flat"} == {"failed"}


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_arm_repeats_its_bits_and_merges_into_what_was_trained(task, arm):
    text, _ = task
    recipe = train.Recipe(text.cells[0], arm.name, first(arm), 1e-3, seed=3, dtype=torch.float32)
    (model, row), (again, _) = train.train(text, recipe), train.train(text, recipe)
    assert row["steps"] == {"early-stopping": row["steps"]}.get(arm.name, 4 * arm.share)
    inputs, _ = text.encode(text.validation)
    with torch.inference_mode():
        expected = text.logits(model, inputs)
        assert torch.equal(expected, text.logits(again, inputs))
        torch.testing.assert_close(text.logits(outcomes.merge(model), inputs), expected, rtol=1e-4, atol=1e-5)


def test_seed_pairs_the_examples_the_order_the_head_and_the_dropout_masks(task):
    text, _ = task
    assert text.draw(text.cells[0], 3) == text.draw(text.cells[0], 3) != text.draw(text.cells[0], 4)
    states = {}
    for arm in ARMS:
        train.train(text, train.Recipe(text.cells[0], arm.name, first(arm), 1e-3, seed=3))
        states[arm.name] = torch.get_rng_state()
    differ = {name for name, state in states.items() if not torch.equal(state, states["lora"])}
    assert differ == {"dropout", "early-stopping", "lora-sam-half", "fmlora-half"}  # more masks, or fewer steps


def test_flipped_labels_are_their_share_and_the_rest_is_as_drawn(task):
    text, _ = task
    cell = text.cells[0]
    clean, flipped = text.draw(replace(cell, flipped=0.0), 5), text.draw(cell, 5)
    assert sum(a.label != b.label for a, b in zip(clean, flipped, strict=True)) == 2  # a quarter of eight
    assert [x.text for x in clean] == [x.text for x in flipped]


# --- records


def test_torn_last_line_is_dropped_and_its_run_made_again(study, tmp_path):
    _, whole = study("one", "--part", "tuning", "--skip", *SOME[1:])
    path = tmp_path / "one" / "text.csv"
    content = path.read_bytes()
    for cut in (len(content) - 7, content.index(b"\n") + 9, 30):  # in the last row, in the first row, in the header
        path.write_bytes(content[:cut])
        _, rows = study("one", "--part", "tuning", "--skip", *SOME[1:])
        assert alike(rows) == alike(whole)


def test_file_of_other_columns_is_refused(tmp_path):
    (tmp_path / "text.csv").write_text("part,cell\n")
    with pytest.raises(ValueError, match="must have the columns of this version"):
        records.Records(tmp_path / "text.csv", ["acc"])


def test_long_command_is_kept_whole(tmp_path):
    file = records.Records(tmp_path / "text.csv", ["acc"])
    file.append({"part": "final", "command": "x" * 500, "acc": 1 / 3})
    assert [(row["command"], row["acc"]) for row in file.rows()] == [("x" * 500, "0.3333333")]


# --- statistics


@pytest.mark.parametrize(
    "whole", [[3, 1, 2], [1, 2, -3, 1, -1], [4, -1, 0, 2, 2], [0, 0], [1] * 10, [5, -2, 7, 1, 1, -3]]
)
def test_sign_flip_p_counts_all_flips(whole):
    flips = list(itertools.product((1, -1), repeat=len(whole)))
    hits = sum(abs(sum(s * d for s, d in zip(f, whole, strict=True))) >= abs(sum(whole)) for f in flips)
    differences = torch.tensor(whole, dtype=torch.float64) * 0.1 / 3  # where ties are not exact in floats
    assert stats.sign_flip_p(differences) == hits / len(flips)


def test_sampled_sign_flips_agree_with_the_normal_limit():
    torch.manual_seed(0)
    differences = torch.randn(400, dtype=torch.float64) + 0.08
    z = differences.sum().abs() / differences.square().sum().sqrt()
    assert stats.sign_flip_p(differences) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.015)


def test_bootstrap_interval_is_the_one_of_all_resamples():
    differences = torch.tensor([0.0, 1.0, 2.0, 10.0])
    means = torch.tensor([sum(d) / 4 for d in itertools.product(differences.tolist(), repeat=4)])
    low, high = means.quantile(torch.tensor([0.1, 0.9])).tolist()
    got = stats.bootstrap_interval(differences, level=0.8, resamples=100_000)
    assert got == pytest.approx((low, high), abs=1e-6) and got == stats.bootstrap_interval(differences, 0.8, 100_000)


def test_holm_is_the_largest_of_the_bonferroni_tests_of_its_steps():
    generator = random.Random(0)
    for _ in range(20):
        p = [generator.choice((0.001, 0.01, 0.02, 0.04, 0.3, 0.9)) for _ in range(6)]
        # by definition: the smallest level at which the step-down procedure rejects
        order = sorted(p)
        expected = [min(1.0, max((6 - k) * order[k] for k in range(order.index(x) + 1))) for x in p]
        assert stats.holm(p) == pytest.approx(expected)


def test_spearman_closed_form_and_ties():
    x, y = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), torch.tensor([30.0, 20.0, 10.0, 50.0, 45.0])
    d = torch.tensor([0.0, 1.0, -1.0, 0.0, 0.0])  # differences of the ranks
    assert stats.spearman(x, y) == pytest.approx(1 - 6 * d.square().sum().item() / (5 * 24))
    assert stats.ranks(torch.tensor([2.0, 1.0, 2.0, 7.0])).tolist() == [2.5, 1.0, 2.5, 4.0]
    assert math.isnan(stats.spearman(x, torch.ones(5)))
    seeds = torch.arange(5)
    assert stats.spearman_interval(x, x.exp(), seeds) == (pytest.approx(1), pytest.approx(1))


def test_mean_and_error_closed_form():
    mean, error = stats.mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert (mean, error) == pytest.approx((3.0, math.sqrt(14 / 3 / 4)))


def test_scores_closed_form():
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.35, 0.65], [0.35, 0.65]]).log()
    found = outcomes.scores(logits, torch.tensor([0, 1, 1, 1]))
    nll = -(math.log(0.8) + math.log(0.2) + 2 * math.log(0.65)) / 4
    brier = (2 * 0.2**2 + 2 * 0.8**2 + 2 * 2 * 0.35**2) / 4
    assert found == pytest.approx({"acc": 0.75, "nll": nll, "brier": brier, "ece": (0.3 + 0.35) / 2}, abs=1e-6)


# --- report


CELL = tasks.Cell("128-clean", 8, 0.0, 4, ("lora", "smoothing", "dropout", "flat"), 4)
TABLE = tasks.Text("text", [], [], [], [CELL], ["movie", "books"])
MOVIE = {"lora": [0.70, 0.72, 0.74, 0.76], "flat": [0.73, 0.73, 0.78, 0.81], "dropout": [0.71, 0.70, 0.75, 0.80]}


def row(part, arm, strength, seed, **more):
    blank = dict.fromkeys([*records.KEY, *records.ORIGIN, *train.columns(TABLE)], "")
    made = {"part": part, "cell": CELL.name, "arm": arm, "strength": strength, "lr": 0.001, "seed": seed}
    return blank | {k: str(v) for k, v in (made | {"status": "ok", "commit": "abc"} | more).items()}


def tuning_rows(arm, acc, nll):
    """Trials of an arm, of which the second strength is the best."""
    grid = BY_NAME[arm].grid
    return [
        row("tuning", arm, s, seed, lr=s if arm == "lora" else 0.001, acc_validation=acc - (k != 1), nll_validation=nll)
        for k, s in enumerate(grid)
        for seed in design.TUNING_SEEDS
    ]


def final_rows():
    tuned = {name: BY_NAME[name].grid[1] for name in MOVIE}
    return [
        row("final", arm, tuned[arm], seed, acc_books=acc, nll_books=1 - acc, acc_movie=acc, acc_train=1, sharpness=acc)
        for arm, of in MOVIE.items()
        for seed, acc in enumerate(of)
    ]


def line(text, section, arm):
    """The cells of an arm in a table."""
    found = text.split(f"### {section}")[1].split("###")[0].splitlines()
    return [cell.strip() for cell in next(x for x in found if x.startswith(f"| {arm} |")).split("|")[1:-1]]


def test_report_holds_means_paired_differences_and_corrected_p():
    rows = tuning_rows("lora", 0.7, 0.6) + tuning_rows("flat", 0.7, 0.6)
    rows += tuning_rows("dropout", 0.8, 0.6) + tuning_rows("smoothing", 0.7, 0.5) + final_rows()
    text = report.report("text", [CELL], rows)
    primary = "Accuracy out of domain, % (primary)"
    difference = torch.tensor([3.0, 1.0, 4.0, 5.0], dtype=torch.float64)
    low, high = stats.bootstrap_interval(difference)
    # p of flat against LoRA: 2 / 16, times three arms that are compared; smoothing has no runs and still counts
    expected = ["Flat-LoRA", "4", "76.2 ± 2.0", f"+3.2 [{low:+.1f}, {high:+.1f}]", "0.375"]
    assert line(text, primary, "Flat-LoRA")[:5] == expected
    error = torch.tensor([73.0, 73.0, 78.0, 81.0]).std().item() / 2
    assert expected[2] == f"{76.25:.1f} ± {error:.1f}"
    assert "minus LoRA, dropout" in text.split(primary)[1].split("###")[0]  # best by accuracy
    d = torch.tensor([2.0, 3.0, 3.0, 1.0], dtype=torch.float64)  # flat minus dropout
    low, high = stats.bootstrap_interval(d)
    assert line(text, primary, "Flat-LoRA")[5] == f"+2.2 [{low:+.1f}, {high:+.1f}]"
    assert "minus LoRA, label smoothing" in text.split("### NLL out of domain")[1].split("###")[0]  # best by NLL
    assert "**44 of" in text and "| 128-clean | final | 12 | 16 | 0 |" in text
    assert "| accuracy | 12 | -1.00 [-1.00, -1.00] |" in text and "| NLL | 12" not in text  # gap 1 - acc, sharpness acc


def test_report_of_a_part_shows_what_is_there_and_nothing_else():
    text = report.report("text", [CELL], [])
    assert (
        "**0 of 271 planned runs.**" in text and "##" not in text
    )  # 32 of tuning, 16 final, 215 ablations, 8 averaged
    rows = tuning_rows("lora", 0.7, 0.6) + tuning_rows("dropout", 0.7, 0.6)[:-1]
    text = report.report("text", [CELL], rows)
    assert line(text, "What tuning chose", "LoRA")[1:4] == ["lr", "0.001", "0.001"]
    assert "LoRA, dropout" not in text and "Accuracy" not in text and "Flat-LoRA" not in text
    rows += tuning_rows("flat", 0.7, 0.6) + [r for r in final_rows() if r["arm"] != "dropout"][:5]
    text = report.report("text", [CELL], rows)
    primary = "Accuracy out of domain, % (primary)"
    assert line(text, primary, "LoRA")[1:3] == ["4", "73.0 ± 1.3"]
    assert line(text, primary, "Flat-LoRA")[1:] == ["1", "73.0", "", ""]  # one pair has no interval
    assert "minus LoRA, " not in text  # which simple regularizer is the best is not known yet


def test_report_leaves_out_failed_runs_and_other_strengths():
    rows = tuning_rows("lora", 0.7, 0.6) + tuning_rows("flat", 0.7, 0.6) + final_rows()
    rows += [row("final", "lora", 0.001, 9, status="failed"), row("final", "flat", 0.4, 9, acc_books=0.1)]
    text = report.report("text", [CELL], rows)
    assert line(text, "Accuracy out of domain, % (primary)", "Flat-LoRA")[1:3] == ["4", "76.2 ± 2.0"]
    assert "| 128-clean | final | 14 | 16 | 1 |" in text


def test_report_command_reads_whole_lines_and_ablations(tmp_path):
    path, out = tmp_path / "text.csv", tmp_path / "report.md"
    ablated = [("flat", "r=4", 0.5), ("lora", "r=8", 0.2), ("flat", "float32", 0.3), ("lora", "float32", 0.1)]
    runs = [(*ablation, seed) for ablation in ablated for seed in (0, 1)]
    rows = [row("ablation", arm, 0.2, s, variant=variant, acc_books=acc + s / 10) for arm, variant, acc, s in runs]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.write("ablation,128-clean,flat,r=4,0.2")  # a process is writing this one
    text = report.main(["--csv", str(path), "--out", str(out)])
    assert out.read_text() == text
    assert line(text, "Ablations", "r=4")[1:6] == ["Flat-LoRA", "0.2", "2", "55.0 ± 5.0", "+30.0 [+30.0, +30.0]"]
    assert line(text, "Ablations", "float32")[1:6] == ["Flat-LoRA", "0.2", "2", "35.0 ± 5.0", "+20.0 [+20.0, +20.0]"]
    with pytest.raises(ValueError, match="--csv must be named after a task"):
        report.main(["--csv", str(tmp_path / "other.csv")])


# --- averaged predictions


def test_averaged_predictions_of_both_arms_are_scored(study, task):
    study("one", "--part", "tuning")
    done, rows = study("one", "--part", "averaged")
    rows = [row for row in rows if row["part"] == "averaged"]
    cell = task[0].cells[0]
    rho = design.chosen(cell, BY_NAME["flat"], rows=read_all(study))
    assert done and [(r["arm"], r["seed"], r["variant"], r["status"]) for r in rows] == [
        (arm, seed, f"averaged=8 rho={rho:g}", "ok") for seed in ("0", "1") for arm in ("lora", "flat")
    ]
    assert all(row["nll_books"] and row["ece_movie"] and not row["sharpness"] for row in rows)


def read_all(study):
    return study("one", "--part", "averaged")[1]


def test_an_averaged_score_is_that_of_the_mean_probability(task):
    made, tests = task
    recipe = train.Recipe(made.cells[0], "flat", 0.4, 0.01, 1, averaged_rho=0.4)
    row = train.averaged(made, recipe, tests, 4)
    model, _ = train.train(made, recipe)
    inputs, labels = made.batch(sorted(tests["books"], key=lambda example: len(example.text)))
    total = 0.0
    for k in range(4):
        with torch.no_grad(), flatlora.perturbed(model, sample=2**32 - 2**16 + k, rho=0.4):
            total = total + made.logits(model, inputs).softmax(-1)
    nll = -(total / 4)[range(len(labels)), labels].log().mean().item()
    assert row["nll_books"] == pytest.approx(nll, abs=1e-5)
    plain = train.averaged(made, replace(recipe, arm="lora", strength=0.01), tests, 4)
    assert plain["nll_books"] != row["nll_books"]


def test_report_compares_an_averaged_prediction_with_the_plain_one():
    rows = tuning_rows("lora", 0.7, 0.6) + tuning_rows("flat", 0.7, 0.6) + final_rows()
    rows += [
        row("averaged", "flat", BY_NAME["flat"].grid[1], seed, variant="averaged=8 rho=0.1", nll_books=0.8998 - acc)
        for seed, acc in enumerate(MOVIE["flat"])
    ]
    text = report.report("text", [CELL], rows)
    found = [x for x in text.split("### Averaged")[1].splitlines() if x.startswith("| NLL out")]
    cells = [cell.strip() for cell in found[0].split("|")[1:-1]]
    d = torch.tensor([-0.1302, -0.1102, -0.1402, -0.1502])
    low, high = stats.bootstrap_interval(d)
    assert cells[1:3] == ["Flat-LoRA, averaged", "4"] and cells[4] == "-0.100 [-0.100, -0.100]"
    assert cells[5] == f"{d.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


# --- what is published


def test_readme_pages_and_figures_hold_what_the_csv_files_say(capsys):
    assert publish.main(["--check"]) == 0, capsys.readouterr().out


def test_blocks_are_replaced_and_the_text_around_them_stays():
    page = "a\n<!-- study: state -->\nold\n<!-- /study -->\nb\n<!-- study: headline -->\n<!-- /study -->\nc"
    once = publish.filled(page, {"state": "x | y", "headline": "z"})
    assert once == (
        "a\n<!-- study: state -->\nx | y\n<!-- /study -->\nb\n<!-- study: headline -->\nz\n<!-- /study -->\nc"
    )
    assert publish.filled(once, {"state": "x | y", "headline": "z"}) == once


def test_the_headline_compares_flat_lora_with_lora_and_the_best_simple_regularizer(monkeypatch):
    monkeypatch.setitem(comparisons.CELLS, "text", [CELL])
    rows = tuning_rows("lora", 0.7, 0.6) + tuning_rows("flat", 0.7, 0.6)
    rows += tuning_rows("dropout", 0.8, 0.6) + tuning_rows("smoothing", 0.7, 0.5) + final_rows()
    line = publish.headline({"text": rows}).splitlines()[-1]
    d = [torch.tensor(x) for x in ([3.0, 1.0, 4.0, 5.0], [2.0, 3.0, 3.0, 1.0])]
    for of in d:
        low, high = stats.bootstrap_interval(of)
        assert f"{of.mean():+.1f} [{low:+.1f}, {high:+.1f}]" in line
    assert line.startswith("| sentiment, MiniLM, `128-clean` | 4 | 73.0 ± 1.3 | 76.2 ± 2.0 |") and "dropout" in line


def test_the_strengths_table_has_the_validation_scores_of_every_trial(monkeypatch):
    monkeypatch.setitem(comparisons.CELLS, "text", [CELL])
    rows = tuning_rows("lora", 0.7, 0.6) + tuning_rows("flat", 1.8, 0.5)
    lines = publish.strengths({"text": rows}).splitlines()
    assert (
        lines[-1]
        == "| text `128-clean` | Flat-LoRA | 70.0, 0.600 | 80.0, 0.500 | 180.0, 0.500 | 80.0, 0.500 | 80.0, 0.500 |"
    )
    assert len(publish.strengths({"text": rows[:-1]}).splitlines()) == 2  # a trial is missing: no line


def test_a_panel_without_a_label_keeps_the_rows_of_the_others():
    few, all_ = {"b": torch.tensor([2.0, 4.0])}, {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([5.0, 5.0])}
    for panels in ({"first": all_, "second": few}, {"first": few, "second": all_}):
        figure = pictures.plot_differences(panels, "points")
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        for ax, panel in zip(figure.axes, panels.values(), strict=True):
            points = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() == "o"]
            means = {labels[int(y)]: x for x, y in points if y == int(y)}
            assert means == {label: d.mean().item() for label, d in panel.items()}
