"""Measures of answers: of classification as GLUE defines them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .files import Row

Collate = Callable[[list[Any]], dict[str, Tensor]]


def labels(rows: Iterable[Row]) -> list[Any]:
    """The different labels, sorted."""
    return sorted({row["label"] for row in rows})


@torch.inference_mode()
def predict(model: nn.Module, rows: Sequence[Any], collate: Collate, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """(logits of the examples in float32, (n, classes); their labels, (n,))."""
    device = next(model.parameters()).device
    model.eval()
    logits, targets = [], []
    for start in tqdm(range(0, len(rows), batch_size), desc="test", leave=False):
        batch = {name: value.to(device) for name, value in collate(list(rows[start : start + batch_size])).items()}
        targets.append(batch.pop("labels"))
        logits.append(model(**batch).logits.float())
    return torch.cat(logits).cpu(), torch.cat(targets).cpu()


def classification(model: nn.Module, rows: Sequence[Any], collate: Collate, task: str = "") -> dict[str, float]:
    """Accuracy and mean negative log-likelihood, and GLUE's measure where it is another one."""
    logits, targets = predict(model, rows, collate)
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
        found["f1"] = f1(answers, targets)
    return found


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation, which for two binary vectors is Matthews'; 0 where one of the two is constant."""
    found = torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1]
    return 0.0 if found.isnan() else found.item()


def f1(answers: Tensor, targets: Tensor) -> float:
    """2 TP / (2 TP + FP + FN) of class 1; 0 without any."""
    hits = ((answers == 1) & (targets == 1)).sum().item()
    found = (answers == 1).sum().item() + (targets == 1).sum().item()
    return 2 * hits / found if found else 0.0
