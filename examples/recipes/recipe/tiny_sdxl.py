"""A tiny pipeline of the classes of Stable Diffusion XL, trained here from scratch on drawn shapes.

No package has a diffusion model, so this one stands in for it: 16 x 16 pixels, a small autoencoder, a UNet of half a
million parameters, and two text encoders with random weights, which are never trained: different prompts get different
vectors, and that is all the UNet needs. The UNet knows circles, squares and triangles in four colors, the autoencoder
the colors of the subject too.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from common.packages import cache_dir, make_once
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .diffusion import Picture, conditions, denoising_loss, encode_pictures, encode_prompts, pixels

SIDE = 16  # pixels of a picture
COLORS = {"red": (214, 69, 65), "green": (63, 159, 91), "blue": (58, 110, 201), "yellow": (233, 185, 54)}
SHAPES = ("circle", "square", "triangle")
SUBJECT = "a sks icon"  # the new word, as in DreamBooth's examples, stands for what the adapter learns
PURPLE, ORANGE = (137, 76, 177), (240, 140, 50)
STEPS = 800  # of the UNet; the autoencoder has a third of it


def shapes(count: int, seed: int) -> list[Picture]:
    """Drawn shapes in all colors, what the tiny pipeline learns from scratch."""
    rng = random.Random(seed)
    kinds = [(shape, color) for shape in SHAPES for color in COLORS]
    drawn = [kinds[k % len(kinds)] for k in range(count)]
    return [Picture(_draw(shape, COLORS[color], rng), f"a {color} {shape}") for shape, color in drawn]


def subject(count: int, seed: int) -> list[Picture]:
    """The subject for DreamBooth: a purple ring around an orange dot, which is none of the shapes."""
    rng = random.Random(seed)
    return [Picture(_draw("ring", PURPLE, rng), SUBJECT) for _ in range(count)]


def _draw(shape: str, color: tuple[int, int, int], rng: random.Random) -> Image.Image:
    fine = 8  # drawn larger and reduced, for smooth edges
    image = Image.new("RGB", (fine * SIDE, fine * SIDE), "white")
    x, y = (fine * rng.uniform(7.5, 8.5) for _ in range(2))
    half = fine * rng.uniform(5, 6)
    box = (x - half, y - half, x + half, y + half)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "triangle":
        pen.polygon([(x - half, y + half), (x + half, y + half), (x, y - half)], fill=color)
    else:
        pen.ellipse(box, outline=color, width=round(half / 3))
        pen.ellipse((x - half / 3, y - half / 3, x + half / 3, y + half / 3), fill=ORANGE)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def tiny_sdxl_folder() -> Path:
    """The pipeline as `save_pretrained` writes it, made the first time (a minute or two on one core)."""
    return make_once(cache_dir() / "tiny-sdxl", lambda folder: make(folder, STEPS))


def make(folder: Path, steps: int) -> None:
    """Train a tiny pipeline and save it."""
    print(f"Training a tiny SDXL pipeline from scratch, once: {steps} steps", flush=True)
    pipeline, pictures = untrained(), shapes(240, seed=0)
    train_autoencoder(pipeline.vae, pixels([*pictures, *subject(60, seed=0)], SIDE), steps // 3)
    latents = encode_pictures(pipeline, pictures, SIDE)
    prompts = encode_prompts(pipeline, [picture.prompt for picture in pictures])
    unet = pipeline.unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(0)
    for _ in trange(steps, desc="UNet", leave=False):
        chosen = torch.randint(len(pictures), (8,))
        given = conditions(prompts, chosen, SIDE)
        denoising_loss(unet, pipeline.scheduler, latents.draw(chosen), given).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    pipeline.save_pretrained(folder)


def train_autoencoder(vae: AutoencoderKL, images: Tensor, steps: int) -> None:
    """Minimize the squared error, with a small weight on the divergence; then set the scale of the latents."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(vae.train().parameters(), lr=3e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in trange(steps, desc="autoencoder", leave=False):
        batch = images[torch.randint(len(images), (8,))]
        latent = vae.encode(batch).latent_dist
        (F.mse_loss(vae.decode(latent.sample()).sample, batch) + 1e-7 * latent.kl().mean()).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    with torch.no_grad():
        vae.eval().register_to_config(scaling_factor=1 / vae.encode(images).latent_dist.mean.std().item())


def untrained() -> StableDiffusionXLPipeline:
    """All parts with random weights."""
    torch.manual_seed(0)
    tokens = _tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIDE, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    torch.nn.init.constant_(vae.quant_conv.bias[4:], -6.0)  # logarithms of the variances: little noise at first
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )  # as in SDXL
    encoders = CLIPTextModel(text), CLIPTextModelWithProjection(text)
    for encoder in encoders:
        torch.nn.init.normal_(encoder.get_input_embeddings().weight)  # random words that differ enough to be told apart
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1],
        tokenizer=tokens, tokenizer_2=tokens, unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def _tokenizer() -> CLIPTokenizer:
    """Each word is a token, whatever the prompts of one's own are: unknown ones are read letter by letter."""
    words = ["a", "an", "the", "sks", "icon", *COLORS, *SHAPES]
    made = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(k) for k in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>",
        initial_alphabet=letters, show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([" ".join([*words, *letters])] * 2, trainer)
    parts = json.loads(made.to_str())["model"]
    return CLIPTokenizer(parts["vocab"], [tuple(pair) for pair in parts["merges"]], model_max_length=16)
