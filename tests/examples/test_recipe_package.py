"""What the recipes share: arguments, local data, results over seeds, and the estimate for a GPU."""

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from recipe import files, metrics, results
from recipe.arguments import RecipeArguments, command, parse, settings
from recipe.estimate import NF4, PEAK, USED, estimate
from recipe.methods import METHODS, config
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from flatlora import FlatLoraConfig

COLUMNS = ["text", "label"]

# ---- local data ----

LINES = {
    "a.csv": [
        ("text,label\nx,y\nx\n", "a.csv, line 3: column 'label' is missing; the line has text, label"),
        ("text,kind\nx,y\n", "a.csv, line 2: column 'label' is missing; the line has text, kind"),
        ('text,label\n"x\nx",y\nx\n', "a.csv, line 4: column 'label' is missing"),
        ("text,label\nx,y\nx,y,z\n", "a.csv, line 3: more values than the 2 columns of the header"),
        ("text,label\n", "a.csv must hold at least one row with the columns text, label, got none"),
        ("", "a.csv must hold at least one row"),
    ],
    "a.jsonl": [
        (
            '{"text": "x", "label": 1}\n\n{"text": "x"}\n',
            "a.jsonl, line 3: column 'label' is missing; the line has text",
        ),
        ('{"text": "x", "label": null}\n', "a.jsonl, line 1: column 'label' is missing"),
        ("{}\n", "a.jsonl, line 1: column 'text' is missing; the line has nothing"),
        ('{"text": "x", "label": 1}\n{"text"\n', "a.jsonl, line 2: not JSON"),
        ('["x", 1]\n', "a.jsonl, line 1: must be an object with columns, got list"),
        ("\n", "a.jsonl must hold at least one row"),
    ],
}


@pytest.mark.parametrize("name, content, message", [(name, *case) for name, cases in LINES.items() for case in cases])
def test_an_error_names_file_line_and_column(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{message}")):
        files.load_rows(str(tmp_path / name), COLUMNS)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.csv; give a .jsonl or .csv file"):
        files.load_rows(str(tmp_path / "gone.csv"), COLUMNS)


def test_both_forms_give_the_same_rows(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one, two",x\nthree,y\n')
    (tmp_path / "a.jsonl").write_text('{"text": "one, two", "label": "x"}\n{"text": "three", "label": "y"}\n')
    rows = [{"text": "one, two", "label": "x"}, {"text": "three", "label": "y"}]
    for name in ("a.csv", "a.jsonl"):
        assert files.load_rows(str(tmp_path / name), COLUMNS) == rows
        assert files.load_rows(str(tmp_path / name), COLUMNS, limit=1) == rows[:1]


@pytest.mark.parametrize("count, test", [(2, 1), (9, 1), (10, 1), (26, 3), (30, 3)])
def test_a_tenth_is_held_out(tmp_path, count, test):
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *(f"{k},x" for k in range(count))]))
    train, held = files.splits(str(tmp_path / "a.csv"), COLUMNS)
    assert (len(train), len(held)) == (count - test, test)
    assert {row["text"] for row in [*train, *held]} == {str(k) for k in range(count)}
    assert files.splits(str(tmp_path / "a.csv"), COLUMNS) == (train, held)


def test_one_row_cannot_be_divided(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nx,y\n")
    with pytest.raises(ValueError, match="a.csv must hold at least two rows, one of which is held out, got 1"):
        files.splits(str(tmp_path / "a.csv"), COLUMNS)


def put_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / name)


def test_a_folder_of_images_has_a_folder_per_label(tmp_path):
    put_images(tmp_path, "cat/b.png", "cat/a.jpg", "dog/c.PNG")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    assert files.read_images(tmp_path) == [
        {"image": tmp_path / "cat/a.jpg", "label": "cat"},
        {"image": tmp_path / "cat/b.png", "label": "cat"},
        {"image": tmp_path / "dog/c.PNG", "label": "dog"},
    ]


def test_metadata_name_the_labels_of_images(tmp_path):
    put_images(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n2.png,x\n1.png,y\n")
    assert [(row["image"].name, row["label"]) for row in files.read_images(tmp_path)] == [
        ("2.png", "x"),
        ("1.png", "y"),
    ]
    (tmp_path / "metadata.csv").write_text("file_name,kind\n2.png,x\n")
    with pytest.raises(ValueError, match="metadata.csv, line 2: column 'label' is missing"):
        files.read_images(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,label\n3.png,x\n")
    with pytest.raises(FileNotFoundError, match="metadata.csv names 3.png, which is not in"):
        files.read_images(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold images .*in one folder per label, got none"):
        files.read_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder .*gone"):
        files.read_images(tmp_path / "gone")


@pytest.mark.parametrize("test", ["test", "validation"])
def test_a_folder_may_say_which_images_are_for_the_test(tmp_path, test):
    put_images(tmp_path, "train/x/1.png", "train/y/2.png", f"{test}/x/3.png")
    train, held = files.image_splits(tmp_path)
    assert [row["image"].name for row in train] == ["1.png", "2.png"]
    assert [(row["image"].name, row["label"]) for row in held] == [("3.png", "x")]


def test_what_the_hub_will_send_is_announced(monkeypatch, capsys, tmp_path):
    import huggingface_hub

    class Cache:
        repos = ()

    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: Cache)
    files.announce("someone/something", "model")
    assert "Downloading the model someone/something from the Hugging Face hub" in capsys.readouterr().out
    files.announce(str(tmp_path), "model")  # a local folder
    Cache.repos = (type("Repo", (), {"repo_type": "model", "repo_id": "someone/something"}),)
    files.announce("someone/something", "model")
    assert capsys.readouterr().out == ""


# ---- arguments ----


@dataclass
class Arguments(RecipeArguments):
    """A recipe with two tasks."""

    task: str = "own"
    batch_size: int = 4


PAPER = {"a": {"learning_rate": 0.5, "seeds": [1, 2], "rho": 0.1}, "b": {"learning_rate": 0.25}}


def test_what_is_given_goes_before_the_paper_and_that_before_the_defaults():
    assert parse(Arguments, PAPER, []).learning_rate == RecipeArguments.learning_rate
    args = parse(Arguments, PAPER, ["--task", "a", "--paper"])
    assert (args.learning_rate, args.seeds, args.rho, args.batch_size) == (0.5, [1, 2], 0.1, 4)
    args = parse(Arguments, PAPER, ["--task", "a", "--paper", "--learning_rate", "1", "--seeds", "7"])
    assert (args.learning_rate, args.seeds, args.rho) == (1.0, [7], 0.1)
    with pytest.raises(ValueError, match="--paper must be given with one of --task a, b, got own"):
        parse(Arguments, PAPER, ["--paper"])


@pytest.mark.parametrize(
    "given, message",
    [
        (["--method", "lora", "magic"], "--method must be of lora, .*got magic"),
        (["--method", "lora", "lora"], "--method must not hold anything twice"),
        (["--seeds", "1", "1"], "--seeds must not hold anything twice, got .1, 1."),
        (["--r", "0"], "--r must be at least 1, got 0"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--train_samples", "0"], "--train_samples must be at least 1, got 0"),
        (["--micro_batch_size", "3"], "--micro_batch_size must divide --batch_size 4, got 3"),
    ],
)
def test_a_wrong_argument_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        parse(Arguments, PAPER, given)


def test_the_command_can_be_typed_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py", "--model", "my model"])
    assert command(None) == "python run.py --model 'my model'"
    assert command(["--r", "2"]) == "python run.py --r 2"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_configuration(method):
    args = parse(Arguments, PAPER, ["--rho", "0.3", "--target_modules", "q,v", "--r", "3"])
    made = config(method, args, seed=5, task_type="SEQ_CLS")
    assert type(made) is METHODS[method] and made.r == 3 and {*made.target_modules} == {"q", "v"}
    if method != "lora":
        assert made.rho == 0.3
    if method == "flat":
        assert made.seed == 5
        args.rho = None
        assert config(method, args, seed=5).rho == FlatLoraConfig().rho


# ---- results ----


@pytest.fixture
def out(tmp_path):
    return ["--output_dir", str(tmp_path / "out"), "--seeds", "0", "1", "2"]


VALUES = {"lora": [1.0, 2.0, 4.0], "flat": [1.5, 2.25, 4.0]}
STUDENT = 4.302652729911275  # 97.5 % quantile with 2 degrees of freedom


def test_means_and_paired_intervals():
    rows = [
        {"method": method, "seed": str(seed), "accuracy": value, "command": "", "machine": ""}
        for method, values in VALUES.items()
        for seed, value in enumerate(values)
    ]
    lora, flat = results.summary(rows, ["lora", "flat"], [0, 1, 2])
    assert lora["mean"] == pytest.approx(7 / 3)
    deviations = [(value - 7 / 3) ** 2 for value in VALUES["lora"]]
    assert lora["error"] == pytest.approx(math.sqrt(sum(deviations) / 2 / 3))
    assert lora["difference"] == ""
    assert flat["difference"] == pytest.approx(0.25)  # of 0.5, 0.25 and 0
    half = STUDENT * math.sqrt((0.25**2 + 0 + 0.25**2) / 2 / 3)
    assert (flat["low"], flat["high"]) == (pytest.approx(0.25 - half), pytest.approx(0.25 + half))
    alone = results.summary(rows, ["lora", "flat"], [2])
    assert [line["error"] for line in alone] == ["", ""] and alone[1]["difference"] == 0 and alone[1]["low"] == ""


@pytest.mark.usefixtures("matplotlib")
def test_what_a_run_took_is_no_metric(tmp_path):
    """It is in results.csv, and has a table of its own in the report."""
    out = ["--output_dir", str(tmp_path), "--method", "lora"]

    def run(method, seed, folder):
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 1.0}]}')
        return {"accuracy": 0.5, "train_seconds": 8.25, "steps": 60, "dpo_train_seconds": 1.5, "dpo_steps": 7}

    assert [line["metric"] for line in results.run_all(parse(Arguments, PAPER, out), run, out)] == ["accuracy"]
    metrics, took = re.findall("<table>.*?</table>", (tmp_path / "report.html").read_text(), re.DOTALL)[:2]
    assert "accuracy" in metrics and "train_seconds" not in metrics and "steps" not in metrics
    assert re.findall("<t[hd]>(.*?)</t[hd]>", took) == [
        *("method", "seed", "train_seconds", "steps", "dpo_train_seconds", "dpo_steps"),
        *("lora", "0", "8.25", "60", "1.5", "7"),
    ]
    with open(tmp_path / "results.csv") as file:
        assert [(row["train_seconds"], row["dpo_steps"]) for row in csv.DictReader(file)] == [("8.25", "7")]


@pytest.mark.usefixtures("matplotlib")
def test_runs_that_were_made_are_not_made_again(out, tmp_path):
    made = []

    def run(method, seed, folder):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((method, seed))
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 1.0}]}')
        return {"accuracy": VALUES.get(method, [0, 0, 0])[seed]}

    with pytest.raises(KeyboardInterrupt):
        results.run_all(parse(Arguments, PAPER, out), run, out)
    first, made[:] = list(made), []
    results.run_all(parse(Arguments, PAPER, [*out, "--save_steps", "7"]), run, out)
    assert sorted([*first, *made]) == sorted((method, seed) for method in VALUES for seed in range(3))
    assert made == [("flat", 1), ("lora", 2), ("flat", 2)]
    with open(tmp_path / "out" / "summary.csv") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["mean"]) for line in lines] == pytest.approx([7 / 3, 7.75 / 3])
    assert "paired by seed" in (tmp_path / "out" / "report.html").read_text()
    more = [*out, "--method", "rwp"]
    made.clear()
    results.run_all(parse(Arguments, PAPER, more), run, more)
    assert made == [("rwp", 0), ("rwp", 1), ("rwp", 2)]


def test_runs_with_other_settings_are_not_mixed(out):
    folder = Path(out[1])
    folder.mkdir()
    results.check_settings(folder, parse(Arguments, PAPER, out))
    results.check_settings(folder, parse(Arguments, PAPER, [*out, "--method", "rwp", "--save_steps", "3"]))
    with pytest.raises(ValueError, match=r"holds runs with other settings \(--r 8\): give another --output_dir"):
        results.check_settings(folder, parse(Arguments, PAPER, [*out, "--r", "4"]))


def test_what_counts_as_a_setting():
    kept = settings(parse(Arguments, PAPER, []))
    assert {"model", "dataset", "r", "rho", "task", "paper"} <= kept.keys()
    assert not {"method", "seeds", "output_dir", "save_steps", "estimate"} & kept.keys()
    json.dumps(kept)


# ---- measures ----


def test_the_measures_of_glue():
    targets = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1])
    answers = torch.tensor([1, 1, 0, 0, 0, 1, 0, 1])  # TP 3, FN 1, FP 1, TN 3
    logits = torch.nn.functional.one_hot(answers).float()
    found = metrics.measures(logits, targets, "mrpc")
    assert found["accuracy"] == 6 / 8 and found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["nll"] == pytest.approx(math.log(1 + math.e) - 6 / 8)
    assert metrics.measures(logits[:5], targets[:5], "mrpc", positive=0)["f1"] == pytest.approx(4 / 5)  # TP 2, FP 1
    matthews = (3 * 3 - 1 * 1) / math.sqrt(4 * 4 * 4 * 4)
    assert metrics.measures(logits, targets, "cola")["matthews"] == pytest.approx(matthews)
    assert metrics.measures(logits, torch.ones(8, dtype=torch.long), "cola")["matthews"] == 0.0
    x, y = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0])
    expected = torch.dot(x - x.mean(), y - y.mean()) / ((x - x.mean()).norm() * (y - y.mean()).norm())
    assert metrics.measures(x[:, None], y)["pearson"] == pytest.approx(expected.item())


def test_a_label_that_was_not_trained_is_named():
    metrics.check_labels(["a", "b"], [{"label": "a"}])
    with pytest.raises(ValueError, match=r"every test label must be one of the training data's \['a'\], got \['b'\]"):
        metrics.check_labels(["a"], [{"label": "a"}, {"label": "b"}])


# ---- the estimate ----

N, M, K, R, B = 24, 40, 8, 3, 5


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.classifier = nn.Linear(N, M, bias=False), nn.Linear(M, K, bias=False)

    def forward(self, x):
        return SequenceClassifierOutput(loss=self.classifier(self.first(x).tanh()).sum())


def two(*more):
    args = parse(Arguments, PAPER, ["--r", str(R), "--target_modules", "first,classifier", *more])
    return estimate(lambda: (Two(), {"x": torch.ones(B, N)}), args, examples=20)


def test_the_bytes_of_an_estimate_are_those_of_a_sum_by_hand():
    found = two()
    assert found.weights == 4 * (N * M + M * K)
    assert found.adapters == 16 * (R * (N + M) + R * (M + K))
    assert found.saved == 4 * (B * N + B * R + B * M + B * R)  # x, A x, tanh, A tanh
    assert found.bytes == found.weights + found.adapters + found.saved
    assert two("--load_in_4bit").weights == round(NF4 * N * M) + 4 * M * K  # the head is not quantized


def test_the_operations_of_an_estimate_are_those_of_the_closed_form():
    forward = N * M + N * R + R * M + M * K + M * R + R * K
    weights, inputs = N * R + R * M + M * R + R * K, R * M + R * K + M * R + M * K  # x itself has no gradient
    assert two().work == 2 * B * (forward + weights + inputs)


def test_the_time_of_an_estimate():
    found = two("--epochs", "3", "--micro_batch_size", "2")
    assert (found.steps, found.micro_batches) == (15, 2)  # 3 * 20 / 4, of 4 / 2
    assert found.seconds == pytest.approx(30 * (found.work / (PEAK * USED) + found.noise_seconds))
    assert two("--max_steps", "7").steps == 7
    assert str(found).startswith("Computed, not measured, for one A100 of 80 GB: 0.0 GiB")
