"""The recipe for questions about images, on tiny models of the classes of Qwen2.5-VL and LLaVA."""

import csv
import json

import peft
import pytest
import torch
import vision_language
from PIL import Image
from recipe import charts, image_text
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

KINDS = {"tiny-qwen": Qwen2_5_VLForConditionalGeneration, "tiny-llava": LlavaForConditionalGeneration}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A model with random weights and its processor, saved."""
    made = tmp_path_factory.mktemp(request.param)
    charts.make(made, request.param, steps=0)
    return made


def command(folder, out, *more):
    sizes = ["--max_steps", "3", "--batch_size", "4", "--train_samples", "12", "--eval_samples", "8"]
    return ["--model", str(folder), "--output_dir", str(out), *sizes, "--save_steps", "2", *more]


def test_runs_and_writes_results(folder, tmp_path):
    vision_language.main(command(folder, tmp_path, "--method", "lora", "flat", "efmlora"))
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["lora", "flat", "efmlora"]
    assert all({"before", "score"} <= row.keys() and row["steps"] == "3" for row in rows)
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text()
    rows = charts.charts(4, seed=5)
    made = image_text.processor(str(folder))
    base = vision_language.image_text.model(str(folder), vision_language.Arguments())
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "flat-seed0" / "adapter")
    assert type(plain.peft_config["default"]) is peft.LoraConfig
    assert len(image_text.answers(plain, made, rows, 2, 2, torch.float32)) == 4


def test_the_loss_is_on_the_answers_alone(folder):
    made = image_text.processor(str(folder))
    rows = [{**row, "answer": answer} for row, answer in zip(charts.charts(2, 0), ["red", "red blue"], strict=True)]
    batch = image_text.collate(made, rows)
    texts = [made.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert texts == ["red </s>", "red blue </s>"]
    # what the loss asks for is what generation continues
    before = image_text.prompts(made, rows)
    assert torch.equal(batch["input_ids"][:, : before["input_ids"].shape[1]], before["input_ids"])


def test_padding_changes_no_loss(folder):
    """The loss of rows of different lengths together is that of each alone, weighted by its tokens."""
    made, model = image_text.processor(str(folder)), image_text.model(str(folder), vision_language.Arguments())
    rows = charts.charts(2, 0, questions=(charts.COUNT, charts.HIGHEST))
    rows[1] = {**rows[1], "answer": "red blue"}
    with torch.no_grad():
        each = [model(**image_text.collate(made, [row])).loss for row in rows]
        together = model(**image_text.collate(made, rows)).loss
    torch.testing.assert_close(together, (2 * each[0] + 3 * each[1]) / 5, rtol=1e-4, atol=1e-5)


@kinds
def test_the_tiny_models_are_of_the_published_classes(kind):
    model, _ = charts.untrained(kind)
    assert type(model) is KINDS[kind]


@pytest.mark.thorough
@pytest.mark.slow
@kinds
def test_the_tiny_models_learn_from_the_image(kind, tmp_path):
    """The color of the first bar can be guessed with probability 1/4, the number of bars with 1/3."""
    charts.make(tmp_path, kind, steps=250)
    rows = charts.charts(60, seed=3, questions=(charts.COUNT, charts.FIRST))
    model = image_text.model(str(tmp_path), vision_language.Arguments())
    found = image_text.answers(model, image_text.processor(str(tmp_path)), rows, 2, 30, torch.float32)
    assert image_text.mean_score(found, rows) > 0.5


def test_a_file_of_ones_own(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "what color", "answer": k} for k in range(10)]
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    args = vision_language.Arguments(task="own", dataset=str(data), max_pixels=200)
    train, test = vision_language.load(args)
    assert (len(train), len(test)) == (9, 1)
    assert train[0]["image"].size == (20, 10) and isinstance(train[0]["answer"], str)
    data.write_text("\n".join(json.dumps({**row, "image": "b.png"}) for row in rows))
    with pytest.raises(FileNotFoundError, match=r"there is no image .*b\.png"):
        vision_language.load(args)
    data.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"image": "a.png", "question": "what"}))
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2: column 'answer' is missing; the line has image"):
        vision_language.load(args)


def test_the_form_of_scienceqa():
    row = {"image": "x", "question": "Which?", "hint": "Look.", "choices": ["ice", "fire"], "answer": 1}
    found = vision_language.one(row, "scienceqa")
    assert found["question"] == "Which?\nLook.\nA. ice\nB. fire\nAnswer with the letter."
    assert found["answer"] == "B"


def test_the_form_of_vizwiz():
    given = ["Red", "blue", "red.", "red"]
    found = vision_language.one(
        {"image": "x", "question": "?", "answers": [{"answer": a, "answer_confidence": "yes"} for a in given]}, "vizwiz"
    )
    assert found["answer"] == "Red"
    # of the others, 2, 3, 2, 2 say red; 1, 0, 1, 1 say blue
    assert image_text.score("red", found) == pytest.approx((2 / 3 + 1 + 2 / 3 + 2 / 3) / 4)
    assert image_text.score(" Blue.", found) == pytest.approx((1 / 3 + 0 + 1 / 3 + 1 / 3) / 4)
    assert image_text.score("green", found) == 0.0


def test_an_unknown_task():
    with pytest.raises(ValueError, match="--task must be one of charts, scienceqa, vizwiz, own, got maps"):
        vision_language.load(vision_language.Arguments(task="maps"))


def test_the_model_of_the_estimate_has_the_published_size():
    """Qwen2.5-VL-7B-Instruct has 8,292,166,656 parameters: 16,584,333,312 bytes in bfloat16, as its index says."""
    with torch.device("meta"):
        model, inputs = vision_language.micro_batch(vision_language.Arguments(dtype="bfloat16"))
    assert sum(p.numel() for p in model.parameters()) == 8_292_166_656
    assert inputs["tokens"].shape == (16, 576 + 64)


@pytest.mark.thorough
@pytest.mark.slow
def test_estimate(capsys):
    assert vision_language.main(["--task", "scienceqa", "--paper", "--estimate"]) == []
    assert "195 steps of 8 micro-batches" in capsys.readouterr().out
