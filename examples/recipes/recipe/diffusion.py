"""Stable Diffusion XL: pictures, latents, the denoising loss, and sheets of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.quantizers import PipelineQuantizationConfig
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm.auto import tqdm

from .arguments import RecipeArguments
from .files import hub_rows, read_images

STEPS = 25  # of the sampler, for a sheet
SEEDS = 3  # pictures of a prompt in a sheet
MEASURED = 16  # draws of noise and time for each picture, to measure the loss


@dataclass(frozen=True)
class Picture:
    """A picture and the prompt that describes it."""

    image: Image.Image
    prompt: str


@dataclass(frozen=True)
class Latents:
    """Gaussian of each picture's latent, as the autoencoder gives it, times its scaling factor."""

    mean: Tensor  # (pictures, channels, height, width)
    std: Tensor

    def draw(self, chosen: Tensor) -> Tensor:
        """A sample of each of these pictures, by torch's generator."""
        mean, std = self.mean[chosen], self.std[chosen]
        return mean + std * torch.randn(mean.shape).to(mean)


@dataclass(frozen=True)
class Prompts:
    """What the two text encoders make of the prompts."""

    tokens: Tensor  # (prompts, tokens, both widths)
    pooled: Tensor  # (prompts, width of the second)


def pixels(pictures: Sequence[Picture], side: int) -> Tensor:
    """(pictures, 3, side, side) in [-1, 1]: the short side is scaled to `side`, and the middle is taken."""
    made = []
    for picture in pictures:
        image = picture.image.convert("RGB")
        scale = side / min(image.size)
        image = image.resize([max(side, round(scale * x)) for x in image.size], Image.Resampling.LANCZOS)
        left, top = ((x - side) // 2 for x in image.size)
        image = image.crop((left, top, left + side, top + side))
        made.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(made)


@torch.no_grad()
def encode_pictures(pipeline: Any, pictures: Sequence[Picture], side: int) -> Latents:
    """The latents of pictures; one at a time, as the autoencoder of SDXL needs much memory."""
    vae, parts = pipeline.vae, []
    for image in tqdm(pixels(pictures, side), desc="latents", leave=False):
        found = vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist
        parts.append((found.mean, found.std))
    mean, std = (torch.cat(x).float() * vae.config.scaling_factor for x in zip(*parts, strict=True))
    return Latents(mean, std)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str]) -> Prompts:
    """What the UNet gets for each prompt; equal ones are encoded once."""
    unique = list(dict.fromkeys(prompts))
    tokens, _, pooled, _ = pipeline.encode_prompt(unique, do_classifier_free_guidance=False)
    index = [unique.index(prompt) for prompt in prompts]
    return Prompts(tokens[index], pooled[index])


def conditions(prompts: Prompts, chosen: Tensor, side: int) -> dict[str, Any]:
    """The UNet's arguments: the prompts, and the size and crop of the picture that SDXL is also told."""
    tokens, pooled = prompts.tokens[chosen], prompts.pooled[chosen]
    sizes = torch.tensor([[side, side, 0, 0, side, side]] * len(chosen)).to(pooled)
    return {"encoder_hidden_states": tokens, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


def denoising_loss(unet: nn.Module, scheduler: Any, latents: Tensor, given: dict[str, Any]) -> Tensor:
    """mean (noise - unet(sqrt(a_t) x + sqrt(1 - a_t) noise, t))^2, t uniform; by torch's generator on the CPU.

    Ho et al., arXiv 2006.11239, equation 14.
    """
    noise = torch.randn(latents.shape).to(latents)
    times = torch.randint(len(scheduler.alphas_cumprod), (len(latents),)).to(latents.device)
    kept = scheduler.alphas_cumprod.to(latents)[times][:, None, None, None]
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    dtype = next(unet.parameters()).dtype
    found = unet(noisy.to(dtype), times, **given).sample
    return F.mse_loss(found.float(), noise)


def pictures(dataset: str, prompt: str, limit: int | None) -> list[Picture]:
    """The pictures of a folder, or of a dataset on the hub with a column `image`.

    Args:
        prompt: of every picture of the hub, and of those of a folder whose metadata have no column `prompt`.
    """
    if not Path(dataset).is_dir():
        rows = hub_rows(dataset, ["image"], "train", limit)
        return [Picture(row["image"].convert("RGB"), prompt) for row in rows]
    rows = read_images(Path(dataset), ())[:limit]
    return [Picture(Image.open(row["image"]).convert("RGB"), str(row.get("prompt") or prompt)) for row in rows]


def loading(args: RecipeArguments) -> dict[str, Any]:
    """Arguments of a pipeline's `from_pretrained`: the dtype, and for QLoRA the UNet in 4 bits."""
    dtype = getattr(torch, args.dtype)
    if not args.load_in_4bit:
        return {"dtype": dtype}
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    options["bnb_4bit_use_double_quant"] = True
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit", quant_kwargs=options, components_to_quantize=["unet"]
    )
    return {"dtype": dtype, "quantization_config": config}


@torch.no_grad()
def mean_loss(unet: nn.Module, scheduler: Any, latents: Latents, prompts: Prompts, side: int) -> float:
    """The denoising loss without training, over noise and times that are always the same."""
    unet.eval()
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2**31)  # no run trains with it
        for k in range(len(latents.mean)):
            for _ in range(MEASURED // 4):
                chosen = torch.tensor([k] * 4)
                given = conditions(prompts, chosen, side)
                found.append(denoising_loss(unet, scheduler, latents.draw(chosen), given).item())
    return sum(found) / len(found)


@torch.no_grad()
def draw(pipeline: Any, prompts: Sequence[str], side: int, guidance: float) -> list[list[Image.Image]]:
    """SEEDS pictures for each prompt, from noise that is the same at every call."""
    pipeline.unet.eval()
    drawn = []
    for prompt in tqdm(prompts, desc="pictures", leave=False):
        noise = [torch.Generator().manual_seed(k) for k in range(SEEDS)]
        options = {"num_inference_steps": STEPS, "guidance_scale": guidance, "generator": noise}
        drawn.append(pipeline([prompt] * SEEDS, height=side, width=side, **options).images)
    return drawn


def sheet(
    trained: Sequence[Picture], before: list[list[Image.Image]], after: list[list[Image.Image]], prompts: Sequence[str]
) -> Image.Image:
    """Pictures that were trained on; then for each prompt those before, and those after from the same noise."""
    side, gap, text = 96, 8, 18
    rows = [("trained on", [p.image for p in trained[: 2 * SEEDS]], [])]
    rows += [(f"{prompt}: before, after", *pair) for prompt, *pair in zip(prompts, before, after, strict=True)]
    made = Image.new("RGB", (2 * SEEDS * (side + gap) + 3 * gap, len(rows) * (side + text + gap) + gap), "white")
    pen = ImageDraw.Draw(made)
    for k, (title, left, right) in enumerate(rows):
        top = gap + k * (side + text + gap)
        pen.text((gap, top), title, fill="black")
        for j, image in enumerate([*left, *right]):
            x = gap + j * (side + gap) + (gap if j >= SEEDS and right else 0)
            small = image.resize((side, side), Image.Resampling.NEAREST if image.width < side else Image.Resampling.BOX)
            made.paste(small, (x, top + text))
    return made


def sdxl_unet(dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet of stable-diffusion-xl-base-1.0 with random weights: the sizes of its published configuration."""
    return UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ).to(dtype)  # fmt: skip


class WithLoss(nn.Module):
    """A UNet whose output has the loss, as the estimate needs it."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, tokens: Tensor, pooled: Tensor) -> Any:
        times = torch.ones(len(latents), dtype=torch.long, device=latents.device)
        sizes = torch.ones(len(latents), 6, dtype=pooled.dtype, device=latents.device)
        given = {"text_embeds": pooled, "time_ids": sizes}
        found = self.unet(latents, times, encoder_hidden_states=tokens, added_cond_kwargs=given).sample
        return SimpleNamespace(loss=found.float().square().mean())
