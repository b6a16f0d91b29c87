"""RWP, random weight perturbation (TMLR 2024): Gaussian noise without the filter norm, for comparison with Flat-LoRA.

space="merged"     eps_ij = rho_t ||W'||_F / sqrt(m n) z_ij           one standard deviation for a whole layer
space="adapter"    the same in A and in B, relative to each one's own norm: the ablation of noise in the factors alone

Both have the energy of Flat-LoRA's noise, E ||eps||_F^2 = rho_t^2 ||.||_F^2, so that rho means the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..ops import perturb_weight
from ..ops.norms import norm_dtype
from ..utils.arguments import checker, choice
from .base import AdaptedLayer, FactorOffset, Method, Offsets, TrainingRun, WeightNoise
from .flat_lora import FlatLoraConfig

FACTOR_STREAMS = 2**31  # factors use the upper half of the layer counters, weights the lower half


@dataclass
class RwpConfig(FlatLoraConfig):
    """Configuration of RWP: that of [`FlatLoraConfig`], with one standard deviation for a whole layer.

    Args:
        space (`Literal["merged", "adapter"]`):
            Noise in the merged weight, or in A and B.
        rho (`float`):
            Standard deviation relative to the root mean square of the layer's merged weight (of A, of B).
    """

    space: Literal["merged", "adapter"] = field(
        default="merged",
        metadata={
            "help": "Noise in the merged weight, or in A and B.",
            "check": checker(choice, ("merged", "adapter"), "'merged' or 'adapter'"),
        },
    )

    def make_method(self) -> Method:
        return Rwp() if self.space == "merged" else AdapterRwp()


@dataclass(frozen=True)
class Rwp(WeightNoise):
    """The method of [`RwpConfig`] in the merged weight."""

    def row_scale(self, row_norms: Tensor) -> Tensor:
        return row_norms.square().mean().sqrt().expand_as(row_norms)


@dataclass(frozen=True)
class AdapterRwp(FactorOffset):
    """The method of [`RwpConfig`] in A and B."""

    transforms: ClassVar[bool] = False
    uses_gradients: ClassVar[bool] = False

    @torch.no_grad()
    def offsets(self, layer: AdaptedLayer, run: TrainingRun) -> Offsets:
        """eps of A and B. A recompute makes it again from the same key."""
        key, _ = run.draw(next(layer.lora_A.parameters()).device)
        made: Offsets = {}
        for place, adapter in enumerate(layer.active_flat_adapters()):
            for half, factor in enumerate(("lora_A", "lora_B")):
                weight = layer.factor_weight(factor, adapter)
                rows = weight.flatten(1)
                dtype = norm_dtype(weight.dtype)
                std = run.rho_of([adapter], weight.device) * torch.linalg.vector_norm(rows, dtype=dtype)
                row_std = (std / math.sqrt(rows.numel())).expand(len(rows)).contiguous()
                stream = FACTOR_STREAMS + 64 * layer.stream + 2 * place + half
                zero = torch.zeros_like(rows, dtype=dtype)
                eps = perturb_weight(zero, row_std, key, stream, backend=run.settings.backend)
                made[factor, adapter] = eps.view(weight.shape)
        return made
