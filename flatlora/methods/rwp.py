"""RWP, random weight perturbation (TMLR 2024): Gaussian noise without the filter norm. For comparison with Flat-LoRA.

space="merged"     eps_ij = rho_t ||W'||_F / sqrt(m n) z_ij           one standard deviation for a whole layer
space="adapter"    the same in A and in B, relative to each one's own norm: the ablation of noise in the factors alone

Both have the expected size of Flat-LoRA's noise, E ||eps||_F^2 = rho_t^2 ||.||_F^2, so that rho means the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import FlatLoraConfig
from ..method import FlatLora, Method
from ..ops import perturb_weight
from ..ops.norms import norm_dtype
from ..spread import whole_weight
from ..utils.arguments import checker, choice
from .factors import FactorMethod

FACTOR_STREAMS = 2**31  # the noise of factors is in the upper half of the layer counters, that of weights below


@dataclass
class RwpConfig(FlatLoraConfig):
    """
    RWP: the settings of [`FlatLoraConfig`], noise of one standard deviation for a whole layer.

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
        return MergedRwp() if self.space == "merged" else FactorRwp()


@dataclass(frozen=True)
class MergedRwp(FlatLora):
    def noise_norms(self, row_norms: Tensor) -> Tensor:
        return row_norms.square().mean().sqrt().expand_as(row_norms)

    def unsupported(self, layer: Any, adapter: str) -> str | None:
        if adapter in layer.lora_A:
            return None
        return "RWP needs the norm of the whole merged weight, and an embedding computes the rows it looks up"


@dataclass(frozen=True)
class FactorRwp(FactorMethod):
    transforms = False
    uses_gradients = False

    def offsets(self, layer: Any) -> dict[tuple[str, str], Tensor]:
        key, _ = layer.perturbation.draw(next(layer.lora_A.parameters()).device)
        return self.noise(layer, key)

    @torch.no_grad()
    def noise(self, layer: Any, key: Tensor) -> dict[tuple[str, str], Tensor]:
        """eps of A and B, made again from the same key in a recompute."""
        state, made = layer.perturbation, {}
        for place, adapter in enumerate(layer.active_flat_adapters()):
            for half, factor in enumerate(("lora_A", "lora_B")):
                weight = whole_weight(getattr(layer, factor)[adapter])
                rows = weight.flatten(1)
                dtype = norm_dtype(weight.dtype)
                std = state.rhos[adapter] * state.ramp * torch.linalg.vector_norm(rows, dtype=dtype)
                row_std = (std / math.sqrt(rows.numel())).expand(len(rows)).contiguous()
                stream = FACTOR_STREAMS + 64 * layer.stream + 2 * place + half
                zero = torch.zeros_like(rows, dtype=dtype)
                eps = perturb_weight(zero, row_std, key, stream, backend=state.settings.backend)
                made[factor, adapter] = eps.view(weight.shape)
        return made
