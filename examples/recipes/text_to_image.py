"""Text to image: a subject learned from a few pictures (DreamBooth, arXiv 2208.12242) by LoRA on the UNet of SDXL.

    python examples/recipes/text_to_image.py                                     # a tiny SDXL trained here, drawn icons
    python examples/recipes/text_to_image.py --paper                             # SDXL, 23 icons, as in the paper
    python examples/recipes/text_to_image.py --model stabilityai/stable-diffusion-xl-base-1.0 --resolution 1024 \
        --dataset pictures/ --instance_prompt "a photo of sks dog" --prompts "a photo of sks dog on a beach"

A folder of one's own has images, or also a metadata.jsonl or metadata.csv with the columns `file_name` and `prompt`.
The adapter is saved for `pipeline.load_lora_weights(".../adapter")`. The measure is the loss on noise that training did
not draw; how good the pictures are, only the sheet of pictures shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from recipe import diffusion, models, tiny_sdxl
from recipe.arguments import RecipeArguments, parse
from recipe.diffusion import Latents, Picture, Prompts
from recipe.diffusion_training import fit
from recipe.estimate import estimate
from recipe.methods import config
from recipe.results import run_all

PAPER = {
    "icons": {
        "model": "stabilityai/stable-diffusion-xl-base-1.0",
        "dataset": "linoyts/3d_icon",
        "instance_prompt": "a TOK icon, in the style of TOK",
        "resolution": 1024,
        "r": 4,
        "lora_alpha": 4,
        "target_modules": "to_q,to_k,to_v,to_out.0",
        "rho": 0.1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "batch_size": 1,
        "max_steps": 500,
        "held_out": 0,
        "guidance": 5.0,
        "prompts": ["a TOK icon of a llama eating ramen, in the style of TOK", "a photo of a llama eating ramen"],
        "dtype": "bfloat16",
    }
}


@dataclass
class Arguments(RecipeArguments):
    """DreamBooth with the UNet of SDXL."""

    instance_prompt: str = field(default=tiny_sdxl.SUBJECT, metadata={"help": "of pictures that have no prompt"})
    prompts: list[str] = field(
        default_factory=lambda: [tiny_sdxl.SUBJECT, "a red circle", "a blue square"],
        metadata={"help": "of the pictures in the sheet"},
    )
    resolution: int = field(default=tiny_sdxl.SIDE, metadata={"help": "pixels of a side"})
    held_out: int = field(default=8, metadata={"help": "pictures that are not trained on"})
    guidance: float = field(default=1.0, metadata={"help": "of the sheet, classifier-free (arXiv 2207.12598); 1: none"})
    model: str = "tiny"
    dataset: str = "drawn"
    r: int = 4
    lora_alpha: int = 4
    target_modules: str = "to_q,to_k,to_v,to_out.0"
    learning_rate: float = 5e-3
    lr_scheduler_type: str = "constant"
    warmup_ratio: float = 0.0
    batch_size: int = 4
    max_steps: int = 120
    dtype: str = "float32"


@dataclass(frozen=True)
class Data:
    """Latents and prompts of the pictures trained on, of held-out ones, and of what the model knew before."""

    parts: dict[str, tuple[Latents, Prompts]]
    pictures: list[Picture]


def load(args: Arguments, pipeline: Any) -> Data:
    """The pictures, encoded."""
    known: dict[str, list[Picture]] = {}
    if args.dataset == "drawn":
        pictures = tiny_sdxl.subject(6 + args.held_out, seed=1)
        known["others"] = tiny_sdxl.shapes(12, seed=1)
    else:
        pictures = diffusion.pictures(args.dataset, args.instance_prompt, args.train_samples)
    if len(pictures) <= args.held_out:
        raise ValueError(f"--held_out must be less than the {len(pictures)} pictures, got {args.held_out}")
    kept = len(pictures) - args.held_out
    new = {"held_out": pictures[kept:]} if args.held_out else {}
    encoded = {}
    for name, some in {"trained": pictures[:kept], **new, **known}.items():
        latents = diffusion.encode_pictures(pipeline, some, args.resolution)
        encoded[name] = latents, diffusion.encode_prompts(pipeline, [picture.prompt for picture in some])
    return Data(encoded, pictures[:kept])


def losses(pipeline: Any, data: Data, side: int, when: str) -> dict[str, float]:
    """The denoising loss on each part, with the same noise for every method."""
    given = pipeline.unet, pipeline.scheduler
    return {f"{name}_{when}": diffusion.mean_loss(*given, *part, side) for name, part in data.parts.items()}


def micro_batch(args: Arguments) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """SDXL's UNet and a micro-batch, for the estimate."""
    size, dtype = args.micro_batch_size or args.batch_size, getattr(torch, args.dtype)
    side = args.resolution // 8
    shapes = {"latents": (4, side, side), "tokens": (77, 2048), "pooled": (1280,)}
    return diffusion.WithLoss(diffusion.sdxl_unet(dtype)), {
        name: torch.ones(size, *shape, dtype=dtype) for name, shape in shapes.items()
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(Arguments, PAPER, arguments)
    if args.estimate:
        print(estimate(lambda: micro_batch(args), args, args.train_samples or 23))
        return []
    name = str(tiny_sdxl.tiny_sdxl_folder()) if args.model == "tiny" else models.source(args.model)
    pipeline = DiffusionPipeline.from_pretrained(name, **diffusion.loading(args)).to(models.device())
    pipeline.set_progress_bar_config(disable=True)
    data = load(args, pipeline)
    how = args.prompts, args.resolution, args.guidance
    before, drawn = losses(pipeline, data, args.resolution, "before"), diffusion.draw(pipeline, *how)

    def run(method: str, seed: int, folder: Path) -> dict[str, float]:
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        pipeline.unet.requires_grad_(False)
        more = {} if method == "lora" else {"total_steps": args.max_steps}
        pipeline.unet.add_adapter(config(method, args, seed, **more))
        trained = fit(pipeline, data.parts["trained"], method, args, folder, seed)
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(folder / "adapter")  # what follows is of the saved file
        after = losses(pipeline, data, args.resolution, "after")
        sheet = diffusion.sheet(data.pictures, drawn, diffusion.draw(pipeline, *how), args.prompts)
        sheet.save(folder / "pictures.png")
        pipeline.unload_lora_weights()
        return {**before, **after, **trained}

    return run_all(args, run, arguments)


if __name__ == "__main__":
    main()
