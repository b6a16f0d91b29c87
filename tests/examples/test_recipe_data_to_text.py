"""Meaning representations of our own, a tiny GPT-2, and the recipe on it."""

import json

import data_to_text
import pytest
import torch
from peft import PeftModel
from recipe import generation, meanings
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 that has learned for a few steps only."""
    folder = tmp_path_factory.mktemp("gpt2")
    meanings._train_tiny_gpt2(folder, steps=3)
    return folder


def arguments(folder, gpt2, *more):
    sizes = ["--max_steps", 4, "--batch_size", 4, "--eval_samples", 3, "--max_new_tokens", 6, "--r", 2]
    return [str(x) for x in ("--model", gpt2, *sizes, "--output_dir", folder / "out", *more)]


def test_every_sentence_says_every_fact():
    some = meanings.meanings(200, seed=5)
    assert len({meanings.text_of(m) for m in some}) == 200
    for m in some:
        for style in meanings.STYLES:
            for say in style:
                assert meanings.slots(meanings.text_of(m), say(m)) == 1
                assert say(m)[0].isupper() and say(m).endswith(".") and "  " not in say(m)


def test_slots_are_the_share_of_the_values_in_the_text():
    assert meanings.slots("name[The Old Mill], food[Italian]", "the old mill serves french food") == 0.5


def test_no_meaning_is_in_training_and_test():
    train, test = meanings.own_data()
    column = data_to_text.MEANING
    assert not {row[column] for row in train} & {row[column] for row in test}
    assert len(test) == 2 * len({row[column] for row in test}) == 80


def test_making_the_model_leaves_the_global_generator_alone_and_gives_the_same_again(gpt2, tmp_path):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    meanings._train_tiny_gpt2(tmp_path, steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (gpt2, tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_the_recipe(gpt2, tmp_path, monkeypatch):
    asked = []
    answers = generation.answers
    monkeypatch.setattr(generation, "answers", lambda *a, **options: asked.append(options) or answers(*a, **options))
    lines = data_to_text.main(arguments(tmp_path, gpt2, "--method", "lora", "flat", "--label_smoothing", 0.1))
    means = {(line["method"], line["metric"]): line["mean"] for line in lines}
    assert {"slots", "train_loss"} <= {metric for _, metric in means}
    assert asked == [{"num_beams": 4, "length_penalty": 1.0, "no_repeat_ngram_size": 0}] * 2
    rows = [json.loads(line) for line in (tmp_path / "out/flat-seed0/texts.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(len(row["references"]) == 2 for row in rows)
    settings = json.loads((tmp_path / "out/flat-seed0/adapter/adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] is True  # Conv1D
    base = AutoModelForCausalLM.from_pretrained(gpt2)
    plain = PeftModel.from_pretrained(base, tmp_path / "out/flat-seed0/adapter").eval()
    prompts = [meanings.PROMPT.format(meaning=row["meaning"]) for row in rows]
    again = answers(plain, AutoTokenizer.from_pretrained(gpt2), prompts, 6, num_beams=4)
    assert [text.strip() for text in again] == [row["text"] for row in rows]  # by stock peft


def test_a_file_of_ones_own_keeps_the_references_of_a_meaning_together(tmp_path):
    file = tmp_path / "mine.csv"
    rows = [f"m{k},t{k}{j}" for k in range(11) for j in range(2)]
    file.write_text("\n".join(["meaning_representation,human_reference", *rows]) + "\n")
    train, test = data_to_text.load(data_to_text.Arguments(dataset=str(file)))
    assert test == {"m0": ["t00", "t01"], "m10": ["t100", "t101"]} and len(train) == 18
    file.write_text("meaning_representation,human_reference\nm,a\nm,b\n")
    with pytest.raises(ValueError, match="at least two meanings"):
        data_to_text.load(data_to_text.Arguments(dataset=str(file)))
