"""Loss, answers and accuracies with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import Encoder, Example

Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


def answer_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the word after each prompt, (examples, vocabulary), float32."""
    last = torch.tensor([-1])  # as a tensor: torch multiplies a slice by a copy of the output layer per example
    return model(**inputs, use_cache=False, logits_to_keep=last).logits[:, 0].float()


def answer_loss(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Mean cross-entropy of the right word after each prompt, a scalar."""
    return F.cross_entropy(answer_logits(model, inputs), targets)


@torch.inference_mode()
def label_logits(
    model: nn.Module, encode: Encoder, examples: Sequence[Example], device: torch.device, batch_size: int = 32
) -> Tensor:
    """Logits of the labels' words, (examples, labels), on the CPU; batches hold texts of similar length."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].text))
    logits = torch.empty(len(examples), len(encode.answer_ids))
    for chunk in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        inputs, _ = encode([examples[i] for i in chunk], device)
        logits[chunk] = answer_logits(model, inputs)[:, encode.answer_ids].cpu()
    return logits


def is_correct(logits: Tensor, examples: Sequence[Example]) -> Tensor:
    """Whether the largest logit is the right label's, (examples,) bool."""
    return logits.argmax(-1) == torch.tensor([example.label for example in examples])


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927).

    Example:
        >>> [round(bound, 4) for bound in wilson(0, 10)]
        [0.0, 0.2775]
    """
    p, z2 = correct / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean of b - a over the same examples, and half its normal 95 % interval.

    Args:
        a, b: whether each example was answered rightly, (examples,) bool.
    """
    difference = b.double() - a.double()
    return difference.mean().item(), Z95 * difference.std().item() / math.sqrt(len(difference))
