"""FMLoRA and EFMLoRA (arXiv 2508.00522): SAM over the full weight, with the perturbation transferred to B.

FMLoRA    (alg. 1)   E_t = E_B(gradients at (A, B));        the step's gradient is taken at (A, B + E_t)
EFMLoRA   (alg. 2)   the step's gradient is taken at (A, B + E_{t-1}); from that same gradient and at that same point,
                     E_t = (1 - beta) E_{t-1} + beta E_B. The first step is plain, and E_1 = E_B.
                     In a step whose passes are all switched off, that point is (A, B)

E_B, of size ||s E_B A||_F <= rho_t in each layer, is `ops.ascent.full_weight_ascent` (eqs. 12, 13, 15).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..config import PerturbedLoraConfig, ScheduleName, schedule_field
from ..ops.ascent import full_weight_ascent
from ..utils.arguments import checker, number
from .base import FactorOffset, Factors, Method, TrainingRun, gradient, trained_factors
from .two_pass import TwoPass

LARGEST_STACK = 2**20  # elements of one factor in a batch, which bounds the memory


@dataclass
class FMLoraConfig(PerturbedLoraConfig):
    """Configuration of FMLoRA (arXiv 2508.00522, algorithm 1). Two passes per step, see `flatlora.ascent`.

    Args:
        rho (`float`):
            Frobenius norm of the perturbation of each layer's full weight, in units of the weight. Default 0.05, the
            lower end of the paper's figures (0.05 to 0.2).
        schedule (`str`):
            Default "inverse_sqrt": rho / sqrt(t), under which the paper proves convergence (theorem 2).
        rtol (`float`, *optional*):
            Singular values of A or B below rtol times the largest count as zero in the pseudo-inverses. Default:
            `sqrt(n eps)`, eps = 2^-52, n the length of A's rows (of B's columns).
    """

    schedule: ScheduleName = schedule_field("inverse_sqrt")
    rtol: float | None = field(
        default=None,
        metadata={
            "help": "Relative size below which a singular value of A or B counts as zero.",
            "check": checker(number, 0, 1, below=True, optional=True, expected="None or in [0, 1)"),
        },
    )

    def make_method(self) -> Method:
        return FMLora(self.rtol)


@dataclass
class EFMLoraConfig(FMLoraConfig):
    """Configuration of EFMLoRA (arXiv 2508.00522, algorithm 2): FMLoRA in one pass per step. The loop calls nothing.

    The first step is plain LoRA. Its perturbation is the initial value of the moving average, as in the paper. The
    same holds for a layer whose first gradient comes at a later step.

    Args:
        beta (`float`):
            Weight of the newest perturbation in the moving average, in (0, 1]. Default 0.9: ours, not the paper's.
        rho, schedule, rtol:
            See [`FMLoraConfig`].
    """

    beta: float = field(
        default=0.9,
        metadata={
            "help": "Weight of the newest perturbation in the moving average.",
            "check": checker(number, 0, 1, above=True, expected="in (0, 1]", hint="; 1 keeps the newest alone"),
        },
    )

    def make_method(self) -> Method:
        return EFMLora(self.rtol, self.beta)


@dataclass(frozen=True)
class _FullWeightAscent:
    rtol: float | None = None

    def perturbations(self, run: TrainingRun) -> Iterator[tuple[Factors, Tensor]]:
        """E_B of each layer from its gradients. Layers of equal shape are computed in one batch."""
        rho_t = {name: rho * run.ramp for name, rho in run.rhos.items()}
        for group in _of_equal_shape(run):
            A = torch.stack([run.whole.value(f.A) for f in group])
            B = torch.stack([_B_of_gradient(f, run) for f in group])
            grad_A = torch.stack([gradient(run, f.A) for f in group])
            grad_B = torch.stack([gradient(run, f.B) for f in group])
            flat = (t.flatten(2) for t in (A, B, grad_A, grad_B))
            E = full_weight_ascent(*flat, scaling=group[0].scaling, rho=rho_t[group[0].adapter], rtol=self.rtol)
            yield from zip(group, E.view(B.shape), strict=True)


@dataclass(frozen=True)
class FMLora(_FullWeightAscent, TwoPass):
    """The method of [`FMLoraConfig`]."""

    def unsupported(self, layer: Any, adapter: str) -> str | None:
        return super().unsupported(layer, adapter) or _of_groups(layer, adapter)

    def ascend(self, run: TrainingRun) -> None:
        for factors, E in self.perturbations(run):
            factors.layer.offsets["lora_B", factors.adapter] = E


@dataclass(frozen=True)
class EFMLora(_FullWeightAscent, FactorOffset):
    """The method of [`EFMLoraConfig`]."""

    beta: float = 0.9

    def unsupported(self, layer: Any, adapter: str) -> str | None:
        return super().unsupported(layer, adapter) or _of_groups(layer, adapter)

    @torch.no_grad()
    def before_step(self, run: TrainingRun, optimizer: Optimizer) -> None:
        if run.rho == 0:
            return
        for (_, layer, adapter, _, _), E in self.perturbations(run):
            before = layer.offsets.get(("lora_B", adapter))
            # a new tensor, because a later backward may need the old one
            layer.offsets["lora_B", adapter] = E if before is None else torch.lerp(before.to(E), E, self.beta)


def _B_of_gradient(f: Factors, run: TrainingRun) -> Tensor:
    """The value of B at which the gradient was computed: dL/dA = s (B + E)^T dL/dW."""
    B, offset = run.whole.value(f.B), f.layer.offsets.get(("lora_B", f.adapter))
    # switched off for the passes of this step, the gradient is that at B
    return B if offset is None or not run.diagnostics.layers_perturbed else B + offset.to(B)


def _of_equal_shape(run: TrainingRun) -> Iterator[list[Factors]]:
    groups: dict[tuple[Any, ...], list[Factors]] = defaultdict(list)
    for f in trained_factors(run):
        A, B = run.whole.shape(f.A), run.whole.shape(f.B)
        groups[A, B, f.A.dtype, f.A.device, f.scaling, f.adapter].append(f)
    for (A, B, *_), group in groups.items():
        size = max(1, LARGEST_STACK // max(A.numel(), B.numel()))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _of_groups(layer: Any, adapter: str) -> str | None:
    groups, experts = getattr(layer.get_base_layer(), "groups", 1), getattr(layer, "num_experts", 1)
    if groups > 1:
        return f"the transfer to B is not defined for a convolution with {groups} groups"
    return None if experts == 1 else f"the transfer to B is not defined for factors that {experts} experts share"
