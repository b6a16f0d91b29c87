"""BAR, balancedness-aware regularization ("Implicit Regularization of SAM for Scale-Invariant Problems", NeurIPS 2024).

SAM on W + sBA makes ||A|| and ||B|| equal, faster where gradients are noisy. BAR does only this, in each layer, just
before the optimizer's update, with eta the learning rate and alpha_t the strength:

oBAR    the factor of larger norm times (1 - alpha_t eta), the other times (1 + alpha_t eta)
nBAR    the factor of larger gradient norm times (1 + alpha_t eta), the other times (1 - alpha_t eta)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..config import PerturbedLoraConfig, ScheduleName, Unset, schedule_field
from ..utils.arguments import checker, choice
from .base import FactorOffset, TrainingRun, gradient, trained_factors


@dataclass
class BarConfig(PerturbedLoraConfig):
    """Configuration of BAR. A and B are rescaled before each optimizer step, without a perturbation.

    The optimizer must update them in float32 (peft's default), since 16 bits would round the scale to 1.

    Args:
        rho (`float`):
            The paper's alpha at the beginning of training. Default 0.25, as in the comparison of arXiv 2508.19564.
        schedule (`str`):
            Default "linear_decay": alpha falls to 0 over the run.
        variant (`Literal["obar", "nbar"]`):
            Balance by the norms of the factors, or by those of their gradients.
    """

    rho: float = field(default=Unset(0.25), metadata={"help": "Strength alpha of the rescaling; 0 is LoRA."})
    schedule: ScheduleName = schedule_field("linear_decay")
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
class Bar(FactorOffset):
    """The method of [`BarConfig`]."""

    variant: str = "obar"

    @torch.no_grad()
    def before_step(self, run: TrainingRun, optimizer: Optimizer) -> None:
        if run.rho == 0:
            return
        rates = {p: group["lr"] for group in run.whole.groups(optimizer) for p in group["params"]}
        for f in trained_factors(run):
            alpha = run.rhos[f.adapter] * run.ramp
            A, B = run.whole.value(f.A), run.whole.value(f.B)
            if self.variant == "obar":
                grow_A = _norm(A) < _norm(B)
            else:
                grow_A = _norm(gradient(run, f.A)) > _norm(gradient(run, f.B))
            for parameter, value, grows in ((f.A, A, grow_A), (f.B, B, ~grow_A)):
                if parameter in rates:  # a frozen factor stays as it is
                    _check_precision(f.name, value)
                    step = alpha * rates[parameter]
                    run.whole.write(parameter, torch.where(grows, value * (1 + step), value * (1 - step)))


def _check_precision(name: str, x: Tensor) -> None:
    """Check that 1 + alpha eta is not rounded to 1: alpha eta is about 1e-4, and bfloat16 has 3 digits.

    Raises:
        RuntimeError: the factor has 16 bits.
    """
    if x.dtype.itemsize < 4:
        raise RuntimeError(
            f"BAR scales A and B by 1 ± alpha * lr, which {x.dtype} rounds to 1, and the optimizer updates factors of "
            f"{name!r} in {x.dtype}. Keep them in float32: create the adapter with autocast_adapter_dtype=True (the "
            "default), do not cast the model after that, and run the forward under autocast."
        )


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm
