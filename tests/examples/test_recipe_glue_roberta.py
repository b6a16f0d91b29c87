"""The recipe for encoders with a classification head, on a tiny BERT."""

import csv
import random

import glue_roberta
import pytest
import torch
from peft import PeftModel
from recipe import files, metrics, models
from recipe.methods import METHODS, adapt
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from flatlora import perturbation

pytestmark = pytest.mark.usefixtures("matplotlib")


@pytest.fixture
def command(tiny_bert, reviews):
    data = ["--dataset", str(reviews / "movies.csv"), "--text_columns", "text", "--model", str(tiny_bert)]
    sizes = ["--max_steps", "4", "--batch_size", "4", "--r", "2", "--learning_rate", "0.01"]
    return [*data, *sizes, "--output_dir", str(reviews / "out")]


def read(folder):
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


def test_runs_and_writes_results(command, reviews):
    lines = glue_roberta.main([*command, "--seeds", "0", "1"])
    assert [(row["method"], row["seed"]) for row in read(reviews / "out")] == [
        (method, seed) for seed in "01" for method in ("lora", "flat")
    ]
    assert {line["metric"] for line in lines} == {"accuracy", "nll", "train_loss"}
    page = (reviews / "out" / "report.html").read_text()
    assert "accuracy" in page and "paired by seed" in page
    adapters = [load_file(reviews / "out" / f"{m}-seed0/adapter/adapter_model.safetensors") for m in ("lora", "flat")]
    assert adapters[0].keys() == adapters[1].keys()
    assert any(not torch.equal(a, b) for a, b in zip(*(x.values() for x in adapters), strict=True))


def test_stock_peft_answers_as_the_recipe_did(command, reviews, tiny_bert):
    glue_roberta.main([*command, "--method", "flat", "--dtype", "float32"])
    (row,) = read(reviews / "out")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    model = PeftModel.from_pretrained(base, reviews / "out" / "flat-seed0" / "adapter")
    args = glue_roberta.parse(glue_roberta.Arguments, {}, command)
    train, test, _ = glue_roberta.load(args)
    tokenizer, labels = models.tokenizer(str(tiny_bert)), metrics.labels(train)

    def collate(rows):
        batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
        return {**batch, "labels": torch.tensor([labels.index(row["label"]) for row in rows])}

    found = metrics.classification(model, test, collate)
    assert found["nll"] == pytest.approx(float(row["nll"]), abs=1e-5)


def test_the_head_is_trained_in_float32_on_a_base_in_bfloat16(command, tiny_bert):
    args = glue_roberta.parse(glue_roberta.Arguments, {}, command)
    model = adapt(models.encoder(args, 2, seed=0), "flat", args, seed=0, task_type="SEQ_CLS").train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = [p for name, p in model.named_parameters() if name not in trained and "original_module" not in name]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    ids = torch.ones(2, 3, dtype=torch.long)
    perturbation(model).progress = 1.0
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())


def test_methods_start_from_the_same_weights(command):
    args = glue_roberta.parse(glue_roberta.Arguments, {}, command)

    def weights(method, seed):
        model = adapt(models.encoder(args, 2, seed), method, args, seed, task_type="SEQ_CLS")
        return {name: p for name, p in model.named_parameters() if "lora_A" in name or "classifier" in name}

    expected = weights("lora", 0)
    for method in METHODS:
        found = weights(method, 0)
        assert all(torch.equal(p, found[name]) for name, p in expected.items())
    other = weights("lora", 1)
    assert not any(torch.equal(p, other[name]) for name, p in expected.items() if p.std() > 0)


def test_at_most_two_texts_can_be_compared():
    with pytest.raises(ValueError, match=r"--text_columns must be one or two, got \['a', 'b', 'c'\]"):
        glue_roberta.parse(glue_roberta.Arguments, {}, ["--text_columns", "a", "b", "c"])


def test_few_shot_examples_are_drawn_by_the_seed(capsys):
    rows = [{"text": str(k), "label": "abc"[min(k // 10, 2)]} for k in range(23)]
    drawn = files.few(rows, 5, seed=1)
    assert [row["label"] for row in drawn] == ["a"] * 5 + ["b"] * 5 + ["c"] * 3
    assert len({row["text"] for row in drawn}) == 13
    assert "{'c': 3}" in capsys.readouterr().out
    assert files.few(rows, 5, seed=1) == drawn != files.few(rows, 5, seed=2)


def test_a_regression_learns_its_numbers(command, tmp_path, tiny_bert):
    rng = random.Random(0)
    words = ["good", "fine", "bad", "dull"]
    rows = [rng.sample(words, 2) for _ in range(40)]
    lines = [f"{a},{b},{(a == 'good') + (b == 'good')}" for a, b in rows]
    (tmp_path / "pairs.csv").write_text("\n".join(["sentence1,sentence2,label", *lines]))
    own = ["--task", "stsb", "--dataset", str(tmp_path / "pairs.csv"), "--output_dir", str(tmp_path / "stsb")]
    model = ["--model", str(tiny_bert), "--max_steps", "60", "--batch_size", "8", "--learning_rate", "0.02"]
    (line, *_) = glue_roberta.main([*own, *model, "--method", "lora", "--dtype", "float32"])
    assert line["metric"] == "pearson" and line["mean"] > 0.8


def test_an_unknown_label_of_the_test_is_named(command, monkeypatch):
    rows = [{"text": "the film is fine", "label": label} for label in ("negative", "positive", "neutral")]
    monkeypatch.setattr(glue_roberta, "load", lambda args: (rows[:2], rows, ["text"]))
    with pytest.raises(ValueError, match=r"every test label must be .*got \['neutral'\]"):
        glue_roberta.main(command)


def test_the_estimate_of_the_paper(capsys):
    assert glue_roberta.main(["--task", "rte", "--paper", "--estimate"]) == []
    assert "780 steps of 8 micro-batches" in capsys.readouterr().out  # 20 epochs of ceil(2490 / 64)
    glue_roberta.main(["--task", "few-rte", "--paper", "--estimate", "--max_length", "8"])
    assert "320 steps of 8 micro-batches" in capsys.readouterr().out  # 20 epochs of 2 * 512 / 64
