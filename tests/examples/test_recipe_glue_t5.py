"""The recipe for T5, text to text, on a T5 as small as the one that it makes, with random weights."""

import csv

import glue_t5
import pytest
import torch
from common import tiny_t5
from common.data import Example
from recipe import metrics

TEXTS = [f"the {noun} is {word}" for noun in ("film", "plot", "cast") for word in ("good", "fine", "bad", "dull")]
LABELS = ["positive", "positive", "negative", "negative"] * 3


def examples(labels):
    return [Example(text, int(label == "positive")) for text, label in zip(TEXTS, labels, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 that has learned to answer with the wrong word, and its tokenizer."""
    made = tmp_path_factory.mktemp("t5")
    tokenizer = tiny_t5.make_tokenizer(TEXTS)
    torch.manual_seed(0)
    model = tiny_t5.make_model(len(tokenizer))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_t5, "STEPS", 40)
        tiny_t5.train(model, tokenizer, examples(reversed(LABELS))).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture
def loaded(folder):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def command(folder, tmp_path):
    rows = [f"{text},{label}" for text, label in zip(TEXTS, LABELS, strict=True)]
    (tmp_path / "own.csv").write_text("\n".join(["sentence,label", *rows * 3]))
    sizes = ["--batch_size", "6", "--r", "4", "--learning_rate", "0.01", "--output_dir", str(tmp_path / "out")]
    return ["--dataset", str(tmp_path / "own.csv"), "--model", str(folder), *sizes]


@pytest.mark.usefixtures("matplotlib")
def test_adapters_learn_the_words_of_the_labels(command, tmp_path):
    lines = glue_t5.main([*command, "--max_steps", "80"])
    found = {(line["method"], line["metric"]): line["mean"] for line in lines}
    assert found["lora", "accuracy"] == found["flat", "accuracy"] == 1.0
    assert found["lora", "nll"] != found["flat", "nll"]
    with open(tmp_path / "out" / "results.csv") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["lora", "flat"]


def test_scores_are_the_log_likelihoods_of_the_words(loaded):
    model, tokenizer = loaded
    labels = ["negative", "positive film"]  # of different lengths
    words = tokenizer(labels, return_tensors="pt", padding=True)
    scorer = metrics.LabelScores(model, words.input_ids.masked_fill(words.attention_mask == 0, -100))
    batch = tokenizer(TEXTS[:3], return_tensors="pt", padding=True)
    with torch.no_grad():
        found = scorer(batch.input_ids, batch.attention_mask).logits
        for row, text in enumerate(TEXTS[:3]):
            for column, label in enumerate(labels):
                ids, total = tokenizer(label).input_ids, 0.0
                assert ids[-1] == tokenizer.eos_token_id
                for k, token in enumerate(ids):  # one token after the other
                    before = torch.tensor([[0, *ids[:k]]])
                    logits = model(**tokenizer(text, return_tensors="pt"), decoder_input_ids=before).logits[0, -1]
                    total += logits.log_softmax(-1)[token].item()
                assert found[row, column].item() == pytest.approx(total, abs=1e-4)


def test_a_text_names_the_task_and_its_columns(command, loaded, monkeypatch):
    seen = []
    monkeypatch.setattr(glue_t5, "fit", lambda model, method, args, folder, seed, train, collate: seen.append(collate))
    monkeypatch.setattr(glue_t5, "run_all", lambda args, run, arguments: run("lora", 0, None))
    monkeypatch.setattr(glue_t5.metrics, "classification", lambda scores, *more: {"words": 0})
    with pytest.raises(TypeError):  # the stand-in for training has no metrics
        glue_t5.main(command)
    batch = seen[0]([{"sentence": TEXTS[0], "label": "positive"}, {"sentence": TEXTS[2], "label": "negative"}])
    _, tokenizer = loaded
    texts = tokenizer([f"sst2 sentence: {text}" for text in (TEXTS[0], TEXTS[2])], return_tensors="pt", padding=True)
    assert torch.equal(batch["input_ids"], texts.input_ids)
    words = tokenizer(["positive", "negative"], return_tensors="pt").input_ids
    assert torch.equal(batch["labels"], words)


def test_the_tokenizer_has_the_special_tokens_of_t5(loaded):
    model, tokenizer = loaded
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert model.config.decoder_start_token_id == 0
    ids = tokenizer("The FILM is good").input_ids
    assert ids == tokenizer("the film is good").input_ids and ids[-1] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "the film is good"


def test_the_tiny_t5_learned_its_sentences(loaded):
    model, tokenizer = loaded
    words = tokenizer(list(tiny_t5.WORDS), return_tensors="pt").input_ids
    batch = tokenizer([tiny_t5.PREFIX + text for text in TEXTS], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = metrics.LabelScores(model, words)(batch.input_ids, batch.attention_mask).logits
    assert logits.argmax(-1).tolist() == [x.label for x in examples(reversed(LABELS))]


def test_every_task_has_its_settings(capsys):
    for task in glue_t5.PAPER:
        args = glue_t5.parse(glue_t5.Arguments, glue_t5.PAPER, ["--task", task, "--paper"])
        assert args.dataset.endswith(f":{args.name}") and args.columns
    assert glue_t5.main(["--task", "cb", "--paper", "--estimate"]) == []
    assert "400 steps of 1 micro-batches" in capsys.readouterr().out  # 50 epochs of ceil(250 / 32)
