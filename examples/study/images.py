"""Task (b): few images of clothes with EfficientNet-lite0, tested on clean and on corrupted images.

The corruptions and their five severities are those of CIFAR-10-C for images of about this size: D. Hendrycks and
T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from common import vision
from common.vision import CLASSES, Picture
from study.arms import CORE
from study.tasks import UNFIT, Cell, Task, Tests, shuffled_batches
from torch import Tensor, nn

SIZE = 56  # pixels of a side as the network sees it: Fashion-MNIST's 28, twice
ARMS = tuple(name for name in CORE if name not in UNFIT["image"])
IMAGE_CELLS = [
    Cell("200-clean", 200, 0.0, 48, ARMS, 10),
    Cell("200-flipped", 200, 0.2, 48, ARMS, 10),
]

# --- corruptions: images of pixels 0 ... 1, (images, side, side), and a strength


def noise(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise."""
    return x + deviation * torch.randn(x.shape, generator=generator)


def blur(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur, to four standard deviations; the border is continued."""
    reach = int(4 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(x[:, None], [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


def contrast(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Nearer to the mean of the image."""
    mean = x.mean((1, 2), keepdim=True)
    return mean + factor * (x - mean)


def brightness(x: Tensor, more: float, generator: torch.Generator) -> Tensor:
    """Brighter."""
    return x + more


def pixelate(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Fewer, larger pixels, each the mean of what it covers."""
    side = x.shape[-1]
    few, width = int(share * side), side / int(share * side)
    begin, pixel = width * torch.arange(few)[:, None], torch.arange(side)
    covered = (torch.minimum(begin + width, pixel + 1) - torch.maximum(begin, pixel)).clamp(min=0)  # (few, side)
    small = (covered / width) @ x @ (covered / width).T
    return F.interpolate(small[:, None], size=side, mode="nearest-exact")[:, 0]


CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], tuple[float, ...]]] = {
    "noise": (noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "blur": (blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}
SEVERITIES = 5


def corrupt(pictures: Sequence[Picture], name: str) -> list[Picture]:
    """Each picture once, at severity 1, 2, ..., 5, 1, ... in turn: a score is the mean over the severities."""
    change, strengths = CORRUPTIONS[name]
    images = vision.as_tensor(list(pictures)) / 255
    for severity, strength in enumerate(strengths):
        generator = torch.Generator().manual_seed(severity)
        images[severity::SEVERITIES] = change(images[severity::SEVERITIES], strength, generator)
    return [replace(p, pixels=b) for p, b in zip(pictures, vision.as_bytes(255 * images), strict=True)]


# --- the task


@dataclass
class Images(Task):
    """Fashion-MNIST with EfficientNet-lite0."""

    dtype: torch.dtype = torch.float32
    size: int = SIZE

    @cached_property
    def _network(self) -> nn.Module:
        return vision.load_lite0()

    def base(self, seed: int, dtype: torch.dtype) -> nn.Module:
        model = deepcopy(self._network)
        torch.manual_seed(seed)
        model.fc = nn.Linear(model.fc.in_features, CLASSES)
        return model.to(dtype)

    @property
    def adapters(self) -> dict[str, Any]:
        """All 1 x 1 convolutions carry adapters; the head is trained whole."""
        targets = ["expand_conv", "project_conv", "conv_head"]
        return dict(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["fc"])

    def flip(self, example: Picture, rng: random.Random) -> Picture:
        return replace(example, label=rng.choice([k for k in range(CLASSES) if k != example.label]))

    def batches(self, examples: Sequence[Picture], seed: int) -> Iterator[list[Picture]]:
        return shuffled_batches(examples, self.batch_size, seed)

    def encode(self, examples: Sequence[Picture]) -> tuple[dict[str, Tensor], Tensor]:
        gray = (vision.as_tensor(list(examples)) - vision.MEAN) / vision.SCALE
        gray = F.interpolate(gray[:, None], size=self.size, mode="bilinear")
        pixels = gray.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)  # faster on a CPU
        return {"pixels": pixels}, torch.tensor([example.label for example in examples])

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs).float()


def image(validation: int = 800, stopping: int = 200, tests: int = 500) -> tuple[Images, Tests]:
    """Task (b), and its tests."""
    train, test = vision.load_fashion()
    pool, held = train[:-validation], train[-validation:]
    clean = test[:tests]
    domains = {"clean": clean, **{name: corrupt(clean, name) for name in CORRUPTIONS}}
    return Images("image", pool, held, held[:stopping], IMAGE_CELLS, list(domains)), domains
