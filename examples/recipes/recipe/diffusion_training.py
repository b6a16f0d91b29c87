"""A training loop with accelerate for the UNet of a diffusion pipeline, for which transformers' Trainer is not made."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from tqdm.auto import trange

import flatlora

from .diffusion import Latents, Prompts, conditions, denoising_loss


@dataclass
class Loop:
    """The training of one adapter.

    Attributes:
        trained: its parameters, by name.
        state: the perturbation; None for plain LoRA.
        passes: micro-batches of an optimizer step, on each process.
    """

    accelerator: Accelerator
    unet: nn.Module
    scheduler: Any
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    rate: torch.optim.lr_scheduler.LRScheduler
    state: flatlora.Perturbation | None
    micro: int
    passes: int
    side: int
    seed: int

    def backward(self, step: int, latents: Latents, prompts: Prompts) -> float:
        """The gradients of a step, and its loss.

        Pictures, noise and times are drawn by torch's generator, seeded with the step: a run that goes on draws what
        the interrupted one would have drawn, and both passes of a method with two draw the same.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed((self.seed << 32) + step * world + rank)
        total = 0.0
        for _ in range(self.passes):
            chosen = torch.randint(len(latents.mean), (self.micro,))
            given = conditions(prompts, chosen, self.side)
            loss = denoising_loss(self.unet, self.scheduler, latents.draw(chosen), given) / self.passes
            self.accelerator.backward(loss)
            total += loss.item()
        return total

    def step(self, step: int, latents: Latents, prompts: Prompts) -> dict[str, float]:
        """One optimizer step; what the training curves show of it."""
        if self.state is not None and self.state.settings.method.passes == 2:
            with flatlora.ascent(self.unet):
                self.backward(step, latents, prompts)
        loss = self.backward(step, latents, prompts)
        row = {"step": step + 1, "loss": loss, "learning_rate": self.rate.get_last_lr()[0]}
        if self.state is not None:
            row["flat_rho"] = self.state.rho_t
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        return row

    def save(self, file: Path, history: list[dict[str, float]]) -> None:
        """Write a checkpoint, whole or not at all."""
        parts: dict[str, Any] = {"trained": {name: p.detach() for name, p in self.trained.items()}, "history": history}
        parts |= {"optimizer": self.optimizer.state_dict(), "rate": self.rate.state_dict()}
        if self.state is not None:
            parts["flat"] = self.state.state_dict()
        torch.save(parts, file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)

    def load(self, file: Path) -> list[dict[str, float]]:
        """The history of the checkpoint that this run goes on from; empty without one."""
        if not file.exists():
            return []
        parts = torch.load(file, map_location=self.accelerator.device)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(parts["trained"][name])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.rate.load_state_dict(parts["rate"])
        if self.state is not None:
            self.state.load_state_dict(parts["flat"])
        return parts["history"]


def loop(pipeline: Any, method: str, args: Any, seed: int) -> Loop:
    """The loop of a pipeline whose UNet has an adapter; see `Loop`.

    Raises:
        ValueError: the number of steps is not given; an epoch of a few pictures says little.
    """
    if args.max_steps < 1:
        raise ValueError(f"--max_steps must be at least 1, got {args.max_steps}")
    accelerator, unet = Accelerator(), pipeline.unet
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    cast_training_params(unet, dtype=torch.float32)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=args.learning_rate, weight_decay=args.weight_decay)
    warmup = args.warmup_steps or round(args.warmup_ratio * args.max_steps)
    rate = get_scheduler(args.lr_scheduler_type, optimizer, warmup, args.max_steps)
    state = None if method == "lora" else flatlora.perturbation(unet)
    micro = args.micro_batch_size or max(1, args.batch_size // accelerator.num_processes)
    passes = max(1, args.batch_size // (micro * accelerator.num_processes))
    prepared, optimizer = accelerator.prepare(unet, optimizer)
    return Loop(
        accelerator, prepared, pipeline.scheduler, trained, optimizer, rate, state, micro, passes, args.resolution, seed
    )


def fit(
    pipeline: Any, data: tuple[Latents, Prompts], method: str, args: Any, folder: Path, seed: int
) -> dict[str, float]:
    """Train the adapter of the UNet, from the checkpoint in `folder` if there is one, and save it in `folder`/adapter.

    Returns:
        mean training loss, seconds, optimizer steps.
    """
    made, file = loop(pipeline, method, args, seed), folder / "checkpoint.pt"
    history, start = made.load(file), time.perf_counter()
    made.unet.train()
    for step in trange(len(history), args.max_steps, desc="training", leave=False):
        history.append(made.step(step, *data))
        if (step + 1) % args.save_steps == 0 and made.accelerator.is_main_process:
            made.save(file, history)
    seconds = time.perf_counter() - start
    if made.accelerator.is_main_process:
        save(pipeline, folder / "adapter")
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        file.unlink(missing_ok=True)
    made.accelerator.wait_for_everyone()
    loss = sum(row["loss"] for row in history) / len(history)
    return {"train_loss": loss, "train_seconds": round(seconds, 1), "steps": len(history)}


def save(pipeline: Any, folder: Path) -> None:
    """The adapter as `pipeline.load_lora_weights(folder)` takes it, and its settings."""
    unet = pipeline.unet
    layers: dict[str, Tensor] = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    pipeline.save_lora_weights(folder, layers, **_collate_lora_metadata({"unet": unet}))
    unet.peft_config["default"].save_pretrained(folder)
