"""Measures of answers: of classification as GLUE defines them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from .files import Row

Collate = Callable[[list[Any]], dict[str, Tensor]]


def labels(rows: Iterable[Row]) -> list[Any]:
    """The different labels, sorted."""
    return sorted({row["label"] for row in rows})


def check_labels(known: Sequence[Any], rows: Iterable[Row]) -> None:
    """Raise if test rows have labels that the training rows lack.

    Raises:
        ValueError: names the labels.
    """
    if unknown := [label for label in labels(rows) if label not in known]:
        raise ValueError(f"every test label must be one of the training data's {list(known)}, got {unknown}")


@torch.no_grad()  # FSDP2 cannot gather weights in inference mode
def predict(model: nn.Module, rows: Sequence[Any], collate: Collate, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """(logits of the examples in float32, (n, classes); their labels, (n,))."""
    device = next(model.parameters()).device
    model.eval()
    logits, targets = [], []
    for start in tqdm(range(0, len(rows), batch_size), desc="test", leave=False):
        part = [rows[k] for k in range(start, min(start + batch_size, len(rows)))]
        batch = {name: value.to(device) for name, value in collate(part).items()}
        targets.append(batch.pop("labels"))
        logits.append(model(**batch).logits.float())
    return torch.cat(logits).cpu(), torch.cat(targets).cpu()


class LabelScores(nn.Module):
    """An encoder and decoder as a classifier: logits (texts, labels), log p(word of the label, end | text).

    Args:
        words: (labels, tokens), padded with -100.
    """

    def __init__(self, model: nn.Module, words: Tensor) -> None:
        super().__init__()
        self.model, self.words = model, words

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        scores, inputs = [], {"input_ids": input_ids}
        for word in self.words.to(input_ids.device):
            targets = word.repeat(len(input_ids), 1)
            made = self.model(**inputs, attention_mask=attention_mask, labels=targets)
            losses = F.cross_entropy(made.logits.float().mT, targets, reduction="none")  # 0 where the target is -100
            scores.append(-losses.sum(-1))
            inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=made.encoder_last_hidden_state)}
        return SequenceClassifierOutput(logits=torch.stack(scores, -1))


def classification(
    model: nn.Module, rows: Sequence[Any], collate: Collate, task: str = "", positive: int = 1
) -> dict[str, float]:
    """Accuracy and mean negative log-likelihood, and GLUE's measure where it is another one."""
    return measures(*predict(model, rows, collate), task, positive)


def measures(logits: Tensor, targets: Tensor, task: str = "", positive: int = 1) -> dict[str, float]:
    """The measures of `classification`.

    Args:
        logits: (n, classes), or (n, 1) of a regression.
        targets: (n,)
        task: of GLUE.
        positive: the class that F1 is of.
    """
    if logits.shape[-1] == 1:  # STS-B
        return {"pearson": correlation(logits.squeeze(-1), targets)}
    answers = logits.argmax(-1)
    found = {
        "accuracy": (answers == targets).double().mean().item(),
        "nll": F.cross_entropy(logits, targets).item(),
    }
    if task == "cola":
        found["matthews"] = correlation(answers, targets)
    if task in ("mrpc", "qqp"):
        found["f1"] = f1(answers == positive, targets == positive)
    return found


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation, which for two binary vectors is Matthews'; 0 where one of the two is constant."""
    found = torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1]
    return 0.0 if found.isnan() else found.item()


def f1(answers: Tensor, targets: Tensor) -> float:
    """2 TP / (2 TP + FP + FN) of two boolean vectors; 0 where both are false everywhere."""
    found = answers.sum().item() + targets.sum().item()
    return 2 * (answers & targets).sum().item() / found if found else 0.0
