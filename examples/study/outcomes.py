"""What is measured of a trained model: accuracy, proper scores, calibration, rounding, sharpness."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatlora import analysis
from flatlora.analysis.disturbance import round_rows

SCORES = ("acc", "nll", "brier", "ece")
BITS = (8, 4, 3)
ECE_BINS = 15


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, mean negative log-likelihood, Brier score and calibration error.

    Args:
        logits: (examples, classes).
        labels: (examples,).

    Example:
        >>> scores(torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0]))["acc"]
        0.5
    """
    logits = logits.double()
    probabilities = logits.softmax(-1)
    truth = F.one_hot(labels, logits.shape[-1])
    return {
        "acc": (logits.argmax(-1) == labels).double().mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "brier": (probabilities - truth).square().sum(-1).mean().item(),
        "ece": calibration_error(probabilities, labels),
    }


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error: mean of |accuracy - confidence| over equal bins of the confidence, by their size."""
    confidence, answer = probabilities.max(-1)
    right = (answer == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are open at the left
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, index, right - confidence)
    return (gap.abs().sum() / len(labels)).item()


def merge(model: PeftModel) -> nn.Module:
    """The plain model with the float32 merged weights W' = W + sBA; the adapters are gone from `model`."""
    return model.float().merge_and_unload().eval()


def adapted_layers(model: PeftModel) -> list[str]:
    """Names, in the plain model, of the layers that carry adapters."""
    names = [name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")]
    return [name for name in names if model.base_model.model.get_submodule(name).lora_A]


def served(model: nn.Module, dtype: torch.dtype, layers: Iterable[str] = (), bits: int | None = None) -> nn.Module:
    """A copy in the dtype in which it is served, its chosen weights rounded before."""
    model = deepcopy(model)
    if bits is not None:
        with torch.no_grad():
            for name in layers:
                weight = model.get_submodule(name).weight
                weight.copy_(round_rows(weight.flatten(1), bits).view_as(weight))
    return model.to(dtype)


def sharpness(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, layers: list[str], rho: float, pairs: int
) -> float:
    """E_eps L(W' + eps) - L(W') under filter-normalized noise, the same noise for every model."""
    measured = analysis.expected_sharpness(
        model, loss, [batch], rho=rho, samples=pairs, seed=0, layers=set(layers).__contains__, progress=False
    )
    return measured.mean.item()


def top_eigenvalue(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, layers: list[str], steps: int
) -> float:
    """The largest eigenvalue of the Hessian with respect to the merged weights of the adapted layers."""
    hessian = analysis.Hessian(model, loss, [batch], layers=set(layers).__contains__)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        return analysis.top_eigenvalues(hessian, steps=steps, progress=False).values[0].item()
