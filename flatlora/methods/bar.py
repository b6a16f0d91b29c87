"""BAR, balancedness-aware regularisation ("Implicit Regularization of SAM for Scale-Invariant Problems", NeurIPS 2024).

SAM on W + sBA pulls ||A|| and ||B|| together, more strongly where gradients are noisy. BAR does that by itself, in each
layer, just before the optimizer's update, with eta the learning rate and alpha_t the strength:

oBAR    the factor of larger norm times (1 - alpha_t eta), the other times (1 + alpha_t eta)
nBAR    the factor of larger gradient norm times (1 + alpha_t eta), the other times (1 - alpha_t eta)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import PerturbedLoraConfig, Unset
from ..utils.arguments import checker, choice
from .factors import FactorMethod, gradient, trained_factors


@dataclass
class BarConfig(PerturbedLoraConfig):
    """
    BAR: no perturbation and no second pass; A and B are rescaled before each optimizer step.

    Args:
        rho (`float`):
            The paper's alpha, at the beginning of training. Default 0.25, the value of arXiv 2508.19564's comparison.
        schedule (`str`):
            Default "linear_decay": alpha falls to 0 over the run.
        variant (`Literal["obar", "nbar"]`):
            Balance by the norms of the factors, or by those of their gradients.
    """

    rho: float = field(default=Unset(0.25), metadata={"help": "Strength alpha of the rescaling; 0 is LoRA."})
    schedule: Literal["cosine", "linear", "constant", "cosine_decay", "linear_decay", "inverse_sqrt"] = field(
        default="linear_decay", metadata={"help": "How the strength follows from rho over the run."}
    )
    variant: Literal["obar", "nbar"] = field(
        default="obar",
        metadata={
            "help": "Balance by the norms of the factors, or of their gradients.",
            "check": checker(choice, ("obar", "nbar"), "'obar' or 'nbar'"),
        },
    )

    def make_method(self) -> Bar:
        return Bar(self.variant)


@dataclass(frozen=True)
class Bar(FactorMethod):
    variant: str = "obar"

    @torch.no_grad()
    def before_step(self, state: Any, optimizer: Optimizer) -> None:
        if state.rho == 0:
            return
        rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for f in trained_factors(state):
            alpha = state.rhos[f.adapter] * state.ramp
            grow_A = self.grows(f.A, f.B)
            for parameter, grows in ((f.A, grow_A), (f.B, ~grow_A)):
                if parameter in rates:  # a frozen factor stays as it is
                    step = alpha * rates[parameter]
                    parameter.copy_(torch.where(grows, parameter * (1 + step), parameter * (1 - step)))

    def grows(self, A: nn.Parameter, B: nn.Parameter) -> Tensor:
        """Is it A that grows?"""
        if self.variant == "obar":
            return torch.linalg.vector_norm(A) < torch.linalg.vector_norm(B)
        return torch.linalg.vector_norm(gradient(A)) > torch.linalg.vector_norm(gradient(B))
