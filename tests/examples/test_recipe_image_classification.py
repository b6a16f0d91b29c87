"""The recipe for images, on tiny models of the three kinds with random weights."""

import colorsys
import csv
import json

import image_classification
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from PIL import Image
from recipe import images
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

SIDE = 16
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = {"image_size": SIDE, "patch_size": 8}


def clip(tokenizer):
    """A CLIP that reads a text at its largest token (eos_token_id 2), here the name of the label."""
    text = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 1, "projection_dim": 12, **LAYERS}
    vision = {"projection_dim": 12, **LAYERS, **PIXELS}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))


MODELS = {
    "clip": clip,
    "vit": lambda tokenizer: ViTModel(ViTConfig(**LAYERS, **PIXELS)),
    "dinov2": lambda tokenizer: Dinov2Model(Dinov2Config(**LAYERS, **PIXELS)),
}


@pytest.fixture
def model(request, tmp_path, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path / request.param
    MODELS[request.param](tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2], "image_processor_type": "x"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Thirty images in two folders, one reddish and one bluish."""
    for k in range(30):
        label, hue = [("positive", 0.0), ("negative", 0.6)][k % 2]
        color = tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue + k / 300, 0.9, 0.9))
        (tmp_path / "pictures" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 12), color).save(tmp_path / "pictures" / label / f"{k}.png")
    return tmp_path / "pictures"


def command(model, pictures, *more):
    sizes = ["--image_size", str(SIDE), "--batch_size", "6", "--r", "2", "--learning_rate", "0.02"]
    out = ["--output_dir", str(pictures.parent / "out")]
    return ["--model", str(model), "--dataset", str(pictures), *sizes, *out, *more]


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_adapters_learn_two_colors(model, pictures):
    lines = image_classification.main(command(model, pictures, "--max_steps", "30"))
    found = {(line["method"], line["metric"]): line["mean"] for line in lines}
    assert found["lora", "accuracy"] == found["flat", "accuracy"] == 1.0
    assert found["lora", "nll"] != found["flat", "nll"]
    with open(pictures.parent / "out" / "results.csv") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["lora", "flat"]


@pytest.mark.parametrize("model", ["clip"], indirect=True)
def test_clip_answers_by_its_text_encoder_as_zero_shot(model):
    names = ["positive film", "negative_plot"]
    args = image_classification.parse(image_classification.Arguments, {}, ["--model", str(model), "--dtype", "float32"])
    found, trained_too = images.classifier(args, names, seed=0)
    assert trained_too == []
    whole = CLIPModel.from_pretrained(model).eval()
    tokenizer = images.AutoTokenizer.from_pretrained(model)
    texts = tokenizer(["a photo of a positive film.", "a photo of a negative plot."], return_tensors="pt", padding=True)
    values = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = whole(pixel_values=values, **texts).logits_per_image
        made = found.eval()(pixel_values=values, labels=torch.tensor([0, 1, 1]))
    torch.testing.assert_close(made.logits, expected)
    assert not torch.allclose(expected[:, 0], expected[:, 1])
    torch.testing.assert_close(made.loss, F.cross_entropy(expected, torch.tensor([0, 1, 1])))


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("model", ["clip"], indirect=True)
def test_the_adapter_fits_the_encoder_of_clip(model, pictures):
    image_classification.main(command(model, pictures, "--max_steps", "2", "--method", "flat"))
    adapter = pictures.parent / "out" / "flat-seed0" / "adapter"
    loaded = PeftModel.from_pretrained(CLIPVisionModelWithProjection.from_pretrained(model), adapter)
    assert any(p.abs().sum() > 0 for name, p in loaded.named_parameters() if "lora_B" in name)


def test_pixels_are_normalized(tmp_path):
    image = Image.new("RGB", (4, 6), (255, 0, 51))
    image.save(tmp_path / "a.png")
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 0.2]).view(3, 1, 1)
    found = images.pixels([tmp_path / "a.png", image, Image.new("L", (2, 2), 255)], 8, mean, std)
    assert found.shape == (3, 3, 8, 8) and torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0, :, 3, 3], torch.tensor([1.0, -1.6, -0.5]))
    torch.testing.assert_close(found[2, :, 0, 0], (1 - mean.flatten()) / std.flatten())


def test_pixels_have_their_places():
    image = Image.frombytes("RGB", (2, 2), bytes(range(12)))
    found = images.pixels([image], 2, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))[0] * 255
    torch.testing.assert_close(found, torch.arange(12.0).view(2, 2, 3).permute(2, 0, 1))


@pytest.mark.parametrize("model", ["vit"], indirect=True)
def test_the_normalization_is_that_of_the_model(model):
    mean, std = images.normalization(str(model))
    assert mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert std.flatten().tolist() == pytest.approx([0.5, 0.25, 0.2])


def test_the_estimate_of_the_paper(capsys):
    assert image_classification.main(["--task", "cifar10", "--paper", "--estimate"]) == []
    assert "3910 steps of 1 micro-batches" in capsys.readouterr().out  # 10 epochs of ceil(50000 / 128)
