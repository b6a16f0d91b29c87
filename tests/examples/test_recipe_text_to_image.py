"""The recipe for text to image, on a tiny SDXL pipeline with random weights."""

import csv

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("diffusers")
import text_to_image
from diffusers import StableDiffusionXLPipeline
from recipe import diffusion, diffusion_training, tiny_sdxl
from recipe.methods import METHODS, config

from flatlora import perturbation

# diffusers' own, in the Euler scheduler
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

KEYS = {"trained", "held_out", "others"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline with random weights, saved."""
    made = tmp_path_factory.mktemp("tiny")
    tiny_sdxl.untrained().save_pretrained(made)
    return made


@pytest.fixture
def pipeline(folder):
    made = StableDiffusionXLPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def command(folder, out, *more, steps=3):
    sizes = ["--max_steps", str(steps), "--batch_size", "2", "--held_out", "2", "--prompts", "a red circle"]
    return ["--model", str(folder), "--output_dir", str(out), *sizes, *more]


def picture(pipeline, prompt=tiny_sdxl.SUBJECT):
    noise = torch.Generator().manual_seed(0)
    made = pipeline(prompt, height=16, width=16, num_inference_steps=3, generator=noise, output_type="np").images
    return torch.from_numpy(made)


def test_runs_and_writes_results(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "STEPS", 2)
    monkeypatch.setattr(diffusion, "MEASURED", 4)
    text_to_image.main(command(folder, tmp_path))
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["lora", "flat"]
    for row in rows:
        assert {f"{key}_{when}" for key in KEYS for when in ("before", "after")} <= row.keys()
        assert row["trained_before"] != row["trained_after"]
    assert rows[0]["trained_before"] == rows[1]["trained_before"]
    with Image.open(tmp_path / "flat-seed0" / "pictures.png") as sheet:
        assert sheet.width > 300
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2


def test_the_trained_unet_and_the_saved_adapter_in_stock_diffusers_draw_the_same(folder, pipeline, tmp_path):
    args = text_to_image.Arguments(max_steps=3, batch_size=2, rho=0.3)
    data = text_to_image.load(args, pipeline)
    clean = picture(pipeline)
    adapted(pipeline, "flat", args)
    diffusion_training.fit(pipeline, data.parts["trained"], "flat", args, tmp_path, seed=0)
    pipeline.unet.eval()
    again = StableDiffusionXLPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    again.load_lora_weights(tmp_path / "adapter")
    assert type(again.unet.peft_config["default_0"]) is peft.LoraConfig
    # loading a plain adapter already differs in the last bit, see tests/loops/test_diffusers.py
    torch.testing.assert_close(picture(again), picture(pipeline), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(picture(again), clean, atol=1e-3)
    again.unload_lora_weights()
    torch.testing.assert_close(picture(again), clean, rtol=1e-4, atol=1e-5)


def adapted(pipeline, method, args):
    torch.manual_seed(0)
    pipeline.unet.requires_grad_(False)
    more = {} if method == "lora" else {"total_steps": args.max_steps}
    pipeline.unet.add_adapter(config(method, args, seed=0, **more))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_its_checkpoint(method, pipeline, tmp_path, monkeypatch):
    """Interrupted after 3 of 4 steps, with a checkpoint after 2: the bits of a run without interruption."""
    args = text_to_image.Arguments(max_steps=4, batch_size=2, micro_batch_size=1, save_steps=2)
    data = text_to_image.load(args, pipeline).parts["trained"]
    files = []
    for name, stop in (("whole", None), ("parts", 3)):
        (tmp_path / name).mkdir()
        if stop:
            adapted(pipeline, method, args)
            interrupt(monkeypatch, stop)
            with pytest.raises(KeyboardInterrupt):
                diffusion_training.fit(pipeline, data, method, args, tmp_path / name, seed=0)
            monkeypatch.undo()
            assert (tmp_path / name / "checkpoint.pt").exists()
            pipeline.unload_lora_weights()
        adapted(pipeline, method, args)
        found = diffusion_training.fit(pipeline, data, method, args, tmp_path / name, seed=0)
        assert found["steps"] == 4
        pipeline.unload_lora_weights()
        files.append(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors")
    whole, parts = (load_file(file) for file in files)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


def interrupt(monkeypatch, at):
    step = diffusion_training.Loop.step

    def until(self, k, *data):
        if k == at:
            raise KeyboardInterrupt
        return step(self, k, *data)

    monkeypatch.setattr(diffusion_training.Loop, "step", until)


def test_ramp_and_micro_batches(pipeline, tmp_path):
    """One noise sample in each forward, the paper's ramp over optimizer steps."""
    args = text_to_image.Arguments(max_steps=3, batch_size=2, micro_batch_size=1, rho=0.2)
    data = text_to_image.load(args, pipeline).parts["trained"]
    adapted(pipeline, "flat", args)
    state = perturbation(pipeline.unet)
    diffusion_training.fit(pipeline, data, "flat", args, tmp_path, seed=0)
    assert state.steps == 3 and state.rho_t == 0.2


def test_the_loss_is_the_mean_squared_error_of_the_noise(pipeline):
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 16, 16)
    given = diffusion.conditions(diffusion.encode_prompts(pipeline, ["a red circle", "a"]), torch.tensor([1, 0]), 16)
    torch.manual_seed(1)
    found = diffusion.denoising_loss(pipeline.unet, pipeline.scheduler, latents, given)
    torch.manual_seed(1)
    noise, times = torch.randn(2, 4, 16, 16), torch.randint(1000, (2,))
    noisy = torch.stack([
        a.sqrt() * x + (1 - a).sqrt() * e
        for a, x, e in zip(pipeline.scheduler.alphas_cumprod[times], latents, noise, strict=True)
    ])  # fmt: skip
    expected = ((pipeline.unet(noisy, times, **given).sample - noise) ** 2).mean()
    torch.testing.assert_close(found, expected)


def test_pictures_of_a_folder_with_and_without_prompts(tmp_path):
    for k in range(3):
        Image.new("RGB", (20, 10), (80 * k, 0, 0)).save(tmp_path / f"{k}.png")
    made = diffusion.pictures(str(tmp_path), "a sks dog", None)
    assert [p.prompt for p in made] == ["a sks dog"] * 3
    pixels = diffusion.pixels(made, 8)
    assert pixels.shape == (3, 3, 8, 8)
    assert pixels[2, 0, 0, 0].item() == pytest.approx(160 / 127.5 - 1)
    (tmp_path / "metadata.csv").write_text("file_name,prompt\n2.png,a red icon\n")
    assert [p.prompt for p in diffusion.pictures(str(tmp_path), "a sks dog", None)] == ["a red icon"]
    (tmp_path / "metadata.csv").write_text("file,prompt\n2.png,a red icon\n")
    with pytest.raises(ValueError, match="metadata.csv, line 2: column 'file_name' is missing"):
        diffusion.pictures(str(tmp_path), "a sks dog", None)


def test_pictures_of_the_hub_have_the_instance_prompt(monkeypatch):
    """As in diffusers' script, which reads no captions unless it is told their column."""
    rows = [{"image": Image.new("L", (4, 4)), "prompt": "a caption"}]
    monkeypatch.setattr(diffusion, "hub_rows", lambda *given: rows)
    (made,) = diffusion.pictures("someone/pictures", "a TOK icon", None)
    assert made.prompt == "a TOK icon" and made.image.mode == "RGB"


def test_more_held_out_than_there_are(folder, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="--held_out must be less than the 1 pictures, got 2"):
        text_to_image.main(command(folder, tmp_path / "out", "--dataset", str(tmp_path)))


def test_the_unet_of_the_estimate_has_the_published_size():
    """2.6 billion parameters (arXiv 2307.01952, table 1); the published file has 2,567,463,684."""
    with torch.device("meta"):
        unet = diffusion.sdxl_unet(torch.bfloat16)
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684


@pytest.mark.thorough
@pytest.mark.slow
def test_estimate(capsys):
    assert text_to_image.main(["--paper", "--estimate"]) == []
    assert "500 steps of 1 micro-batches" in capsys.readouterr().out


@pytest.mark.slow
def test_the_tiny_pipeline_learns(tmp_path):
    """Its training from scratch, shortened: the loss falls."""
    tiny_sdxl.make(tmp_path, 40)
    random, trained = tiny_sdxl.untrained(), StableDiffusionXLPipeline.from_pretrained(tmp_path)
    shapes = tiny_sdxl.shapes(6, seed=5)
    prompts = [p.prompt for p in shapes]
    losses = []
    for pipeline in (random, trained):
        latents = diffusion.encode_pictures(pipeline, shapes, 16)
        encoded = diffusion.encode_prompts(pipeline, prompts)
        losses.append(diffusion.mean_loss(pipeline.unet, pipeline.scheduler, latents, encoded, 16))
    assert losses[1] < 0.8 * losses[0]


def test_every_word_of_the_drawn_prompts_is_a_token():
    tokens = tiny_sdxl.untrained().tokenizer
    assert tokens.tokenize("a sks icon") == ["a</w>", "sks</w>", "icon</w>"]
    assert tokens.unk_token not in tokens.tokenize("zebra")
