"""QLoRA: recipes whose base model is in bitsandbytes' nf4."""

import csv

import continue_training
import pytest
import torch
import vision_language
from recipe import charts, image_text
from recipe.methods import adapt

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def without_packing(monkeypatch):
    """On CPUs with AVX512-BF16 bitsandbytes packs a weight for inference at its first evaluation: the bytes and scales
    change, and rows of less than 64 numbers, as the tiny models have, cannot be packed. A GPU has no such thing.
    """
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)


def results(folder):
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


def test_continued_training(tiny_model, reviews, tmp_path):
    """The reloaded adapter answers as the trained one; the merged model has the unquantized weights instead."""
    sizes = ["--max_steps", "3", "--batch_size", "4", "--dtype", "float32", "--learning_rate", "0.01", "--load_in_4bit"]
    given = ["--model", str(tiny_model), "--dataset", str(reviews / "movies.csv"), "--output_dir", str(tmp_path)]
    continue_training.main([*given, *sizes, "--method", "lora", "flat", "efmlora"])
    for row in results(tmp_path):
        assert float(row["peft_differs_by"]) == 0.0
        assert 1e-4 < float(row["merged_differs_by"]) < 1
        assert len({row["nll_base"], row["nll_first"], row["nll_second"]}) == 3


@pytest.mark.parametrize("kind", ["tiny-qwen", "tiny-llava"])
def test_questions_about_images(kind, tmp_path):
    charts.make(tmp_path / kind, kind, steps=0)
    sizes = ["--max_steps", "2", "--batch_size", "4", "--train_samples", "8", "--eval_samples", "4", "--load_in_4bit"]
    given = ["--model", str(tmp_path / kind), "--output_dir", str(tmp_path / "out")]
    vision_language.main([*given, *sizes, "--method", "lora", "flat"])
    assert [row["steps"] for row in results(tmp_path / "out")] == ["2", "2"]


@pytest.mark.parametrize("method", ["flat", "efmlora"])
def test_the_four_bit_layers_are_perturbed(method, tmp_path):
    """With a large rho the training loss is another one than plain LoRA's; the 4-bit weights stay as they are."""
    charts.make(tmp_path, "tiny-llava", steps=0)
    args = vision_language.Arguments(load_in_4bit=True, rho=1.0)
    made, losses = image_text.processor(str(tmp_path)), []
    batch = image_text.collate(made, charts.charts(4, seed=0))
    for name in ("lora", method):
        length = {} if name == "lora" else {"total_steps": 3}
        model = adapt(image_text.model(str(tmp_path), args), name, args, seed=0, **length).train()
        layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
        assert layers
        before = [layer.weight.clone() for layer in layers]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(model(**batch).loss.item())
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
    assert abs(losses[0] - losses[1]) > 1e-3
