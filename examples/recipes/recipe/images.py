"""Image classifiers, and images as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common.vision import SIDE, load_fashion
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_outputs import ImageClassifierOutput

from .arguments import RecipeArguments
from .files import Row
from .models import head_in_float32, loading, source

PROMPT = "a photo of a {}."  # of the names of the classes, for CLIP
FASHION = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


class ClipClassifier(CLIPVisionModelWithProjection):
    """CLIP's image encoder with a frozen head: the text embeddings of the classes' names.

    logits = scale * v @ head.T with the normalized embeddings v of the images, (images, classes), in float32. Weights
    have the names of CLIPVisionModelWithProjection, so an adapter fits that class.
    """

    _keys_to_ignore_on_load_unexpected = (r"^text_", r"^logit_scale")  # of a whole CLIP
    head: Tensor  # (classes, projection), normalized
    scale: float

    def set_head(self, head: Tensor, scale: float) -> ClipClassifier:
        self.register_buffer("head", head.float(), persistent=False)
        self.scale = scale
        return self

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **options: Any) -> ImageClassifierOutput:
        embeddings = super().forward(pixel_values=pixel_values, **options).image_embeds
        logits = self.scale * F.normalize(embeddings.float(), dim=-1) @ self.head.T
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


@torch.no_grad()
def text_head(name: str, names: Sequence[str]) -> tuple[Tensor, float]:
    """(normalized embeddings of the prompts of the classes, CLIP's scale of the logits)."""
    prompts = [PROMPT.format(str(x).replace("_", " ")) for x in names]
    model = CLIPModel.from_pretrained(name).eval()
    found = model.text_model(**AutoTokenizer.from_pretrained(name)(prompts, return_tensors="pt", padding=True))
    head = F.normalize(model.text_projection(found.pooler_output), dim=-1)
    return head, model.logit_scale.exp().item()


def classifier(args: RecipeArguments, names: Sequence[str], seed: int) -> tuple[PreTrainedModel, list[str]]:
    """(an image classifier, the modules that are trained beside the adapters).

    CLIP has the frozen head of its text encoder; other models have a new head, which the seed sets.
    """
    folder = source(args.model)
    if AutoConfig.from_pretrained(folder).model_type in ("clip", "clip_vision_model"):
        made = ClipClassifier.from_pretrained(folder, **loading(args))
        return made.set_head(*(x.to(made.device) if torch.is_tensor(x) else x for x in text_head(folder, names))), []
    torch.manual_seed(seed)
    made = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=len(names), ignore_mismatched_sizes=True, **loading(args)
    )
    return head_in_float32(made), ["classifier"]


def normalization(model: str) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of the channels that a model was trained with, each (3, 1, 1)."""
    found, _ = ImageProcessingMixin.get_image_processor_dict(source(model))
    mean, std = (torch.tensor(found[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    return mean, std


def pixels(images: Sequence[Path | Image.Image], side: int, mean: Tensor, std: Tensor) -> Tensor:
    """(images, 3, side, side): each image stretched to a square (bicubic), then (x / 255 - mean) / std."""
    made = []
    for image in images:
        opened = Image.open(image) if isinstance(image, Path) else image
        resized = opened.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        values = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(side, side, 3)
        made.append((values.permute(2, 0, 1) / 255 - mean) / std)
    return torch.stack(made)


def fashion(train: int | None = None, test: int | None = None) -> tuple[list[Row], list[Row]]:
    """(training rows, test rows) of the packaged Fashion-MNIST: `image` and the name of its class as `label`."""
    rows = [
        [{"image": Image.frombytes("L", (SIDE, SIDE), x.pixels), "label": FASHION[x.label]} for x in part[:limit]]
        for part, limit in zip(load_fashion(), (train, test), strict=True)
    ]
    return rows[0], rows[1]
