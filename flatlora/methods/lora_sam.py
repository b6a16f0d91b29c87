"""LoRA-SAM: sharpness-aware minimization (arXiv 2010.01412) of the LoRA factors, in two passes per step.

E_A = rho_t G_A / N,    E_B = rho_t G_B / N,    N = sqrt(sum over all layers of ||G_A||_F^2 + ||G_B||_F^2)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import PerturbedLoraConfig
from .base import TrainingRun, gradient, trained_factors
from .two_pass import TwoPass


@dataclass
class LoraSamConfig(PerturbedLoraConfig):
    """Configuration of LoRA-SAM: SAM (arXiv 2010.01412) in the space of A and B.

    Two passes per step, see `flatlora.ascent`.

    Args:
        rho (`float`):
            Euclidean norm of the perturbation of all factors together. Default 0.05, SAM's own.
    """

    def make_method(self) -> LoraSam:
        return LoraSam()


@dataclass(frozen=True)
class LoraSam(TwoPass):
    """The method of [`LoraSamConfig`]."""

    def ascend(self, run: TrainingRun) -> None:
        factors = list(trained_factors(run))
        if not factors:
            return
        gradients = [(gradient(run, f.A), gradient(run, f.B)) for f in factors]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for pair in gradients for grad in pair]
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        scale = torch.where((norm > 0) & norm.isfinite(), 1 / norm, 0.0)
        for f, pair in zip(factors, gradients, strict=True):
            rho_t = run.rhos[f.adapter] * run.ramp
            for name, grad in zip(("lora_A", "lora_B"), pair, strict=True):
                here = scale.to(grad.device)
                f.layer.offsets[name, f.adapter] = torch.where(here > 0, grad * (rho_t * here), 0.0)
