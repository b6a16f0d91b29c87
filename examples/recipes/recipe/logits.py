"""Logits of language models, to compare copies of one model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import device

Batches = Sequence[dict[str, Tensor]]  # with labels, -100 where nothing is to be predicted


@torch.inference_mode()
def logits(model: nn.Module, batches: Batches) -> list[Tensor]:
    """Of each batch, (texts, tokens, vocabulary) in float32 on the CPU."""
    model.eval()
    if not getattr(model, "is_loaded_in_4bit", False):  # those are where they were loaded
        model.to(device())
    where = next(model.parameters()).device
    found = []
    for batch in batches:
        inputs = {name: value.to(where) for name, value in batch.items() if name != "labels"}
        found.append(model(**inputs).logits.float().cpu())
    return found


def nll(found: Sequence[Tensor], batches: Batches) -> float:
    """The mean negative log-likelihood of the labels."""
    targets = [batch["labels"][:, 1:].flatten() for batch in batches]
    total = sum(
        F.cross_entropy(x[:, :-1].flatten(0, 1), y, ignore_index=-100, reduction="sum").item()
        for x, y in zip(found, targets, strict=True)
    )
    return total / sum(int((y != -100).sum()) for y in targets)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor], batches: Batches) -> float:
    """The largest difference of two logits, padding left out."""
    pairs = zip(found, expected, batches, strict=True)
    return max((x - y).abs()[batch["attention_mask"].bool()].max().item() for x, y, batch in pairs)
