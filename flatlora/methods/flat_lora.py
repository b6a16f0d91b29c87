"""Flat-LoRA (arXiv 2409.14396): Gaussian noise in the merged weight, relative to its row norms.

    eps_ij = rho_t / sqrt(n) * ||W'_i|| * z_ij        (eq. 7)

This is what `WeightNoise` does by default, so the method adds nothing to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..config import PerturbedLoraConfig, ScheduleName, schedule_field
from .base import Method, WeightNoise


@dataclass
class FlatLoraConfig(PerturbedLoraConfig):
    """Configuration of Flat-LoRA (arXiv 2409.14396): [`LoraConfig`] with the noise that training adds.

    Each training forward runs at `W + s*B*A + eps`, where `eps_ij = rho_t / sqrt(n) * ||W'_i|| * z_ij`: Gaussian noise
    whose standard deviation in row i is `rho_t / sqrt(n)` times the norm of row i of the merged weight, n the number of
    columns.

    Args:
        rho (`float`):
            Strength of the noise, relative to the weight. 0 is plain LoRA, bit for bit. Default 0.05: the paper's
            value for T5 and Llama-2; its ablation (section 4.6) is best between 0.05 and 0.10.
        schedule (`str`):
            How rho_t follows from rho over the run. Default "cosine", the paper's: it grows from 0 to rho.
        total_steps (`int`, *optional*), on_unsupported (`Literal["error", "warn"]`):
            See [`PerturbedLoraConfig`].
        resample (`Literal["forward", "step"]`):
            "forward": new noise at the first training forward after each backward. "step": one noise sample for each
            optimizer step, as in the paper; the same without gradient accumulation.
        seed (`int`, *optional*):
            Seed of the noise. Default: torch's initial seed, so that `set_seed` reproduces a run.
        backend (`str`):
            The implementation of the noise. "auto" takes the fastest one that is available.
    """

    schedule: ScheduleName = schedule_field("cosine")
    resample: Literal["forward", "step"] = field(
        default="forward", metadata={"help": "New noise after each backward, or once per optimizer step."}
    )
    seed: int | None = field(default=None, metadata={"help": "Seed of the noise; default: torch's initial seed."})
    backend: str = field(default="auto", metadata={"help": "Implementation of the noise; 'auto' takes the fastest."})

    def make_method(self) -> Method:
        return FlatLora()


@dataclass(frozen=True)
class FlatLora(WeightNoise):
    """Noise whose standard deviation in a row is rho_t / sqrt(n) times the norm of the row of the merged weight."""
