"""How much the loss rises around a solution, on average and at worst."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .directions import Norms
from .evaluate import LossFn, bar
from .landscape import positive
from .measurement import Measurement
from .stats import Curve


@dataclass(frozen=True, eq=False)
class ExpectedSharpness(Curve):
    """E_eps[L(W' + eps)] - L(W') at several strengths of the noise; mean, stderr and interval are over the noise.

    Attributes:
        rho: strengths.
        rises: one antithetic pair each, (L(W' + eps) + L(W' - eps)) / 2 - L(W'); independent over samples, the same
            z at every rho.
        center: L(W').
        noise, space, seed: what the noise is; results with the same three can be compared sample by sample.
    """

    GRID, SAMPLES = "rho", "rises"
    rho: Tensor  # (strengths,), float64
    rises: Tensor  # (samples, strengths), float64
    center: float
    noise: str
    space: str
    seed: int


def expected_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    rho: float | Sequence[float] = 0.05,
    samples: int = 8,
    seed: int = 0,
    noise: str = "filter",
    space: str = "merged",
    layers: str | Callable[[str], bool] | None = None,
    norms: Norms | None = None,
    sizes: Sequence[float] | None = None,
    progress: bool | None = None,
    file: str | os.PathLike | None = None,
) -> ExpectedSharpness:
    r"""The mean rise of the loss under random weight noise, the quantity Flat-LoRA makes small.

    .. math::
        S(\rho) = E_\epsilon L(W' + \epsilon) - L(W'), \qquad
        \epsilon_{ij} \sim N(0, \rho^2 \|W'_i\|^2 / n)

    by antithetic pairs, which cancel the odd terms of the loss; for a quadratic loss S = tr(H Sigma) / 2. The model is
    only read, as in `loss_line`; cost: 2 * samples * strengths + 1 passes over the batches.

    Args:
        model, loss_fn, batches, seed, space, layers, norms, sizes, progress, file: as in `loss_line`.
        rho: strengths; default 0.05 (Flat-LoRA, arXiv 2409.14396, for language models).
        samples: antithetic pairs.
        noise: "filter" (Flat-LoRA's), "filter_normalised", "layer" or "plain".

    Raises:
        ValueError: an argument out of bounds.
    """
    strengths = torch.as_tensor(rho, dtype=torch.float64).flatten()
    if not len(strengths) or not strengths.isfinite().all() or (strengths < 0).any():
        raise ValueError(f"rho must be one or more finite numbers >= 0, got {rho}")
    positive("samples", samples)
    loss = Measurement(
        "expected sharpness", model, loss_fn, batches,
        seed=seed, noise=noise, space=space, layers=layers, norms=norms, sizes=sizes, file=file,
    )  # fmt: skip
    rises = torch.empty(samples, len(strengths), dtype=torch.float64)
    with bar(rises.numel(), "expected sharpness", progress) as tick:
        for k in range(samples):
            for p, r in enumerate(strengths.tolist()):
                rises[k, p] = (loss.at((r, k)) + loss.at((-r, k))) / 2 - loss.center
                tick.update()
    return ExpectedSharpness(strengths, rises, loss.center, noise, space, seed)
