"""What a flatness method is: how it perturbs one layer's training forward, and what it does at an optimizer step.

A method is a frozen dataclass of its own settings. What changes during training it keeps on the layers, in
`layer.offsets` (tensors by factor and adapter), where copying, pickling and `state_dict` find it. Flat-LoRA is here,
since it is what a model gets by default; the others are in `flatlora.methods`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Method:
    """The door that every method goes through. `layer` is a `FlatLayer`, `state` the model's `Perturbation`."""

    passes = 1  # forward and backward passes of an optimizer step
    transforms = True  # works inside of a transform of torch.func
    uses_gradients = False  # must see the optimizer's steps, with whole gradients

    def unsupported(self, layer: Any, adapter: str) -> str | None:
        """Why the method is not defined for this adapter of a LoRA layer, or None if it is."""
        return None

    def adopt(self, layer: Any, adapter: str) -> None:
        """Prepare a layer whose `adapter` has just become flat."""

    def forward(self, layer: Any, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A perturbed training forward; `plain` is peft's own."""
        return plain(x, *args, **kwargs)

    def before_step(self, state: Any, optimizer: Optimizer) -> None:
        """Gradients are what the optimizer is about to use. Not called for a step that is skipped for an overflow."""

    def after_step(self, state: Any, optimizer: Optimizer) -> None:
        """The optimizer has made its step."""


@dataclass(frozen=True)
class FlatLora(Method):
    """Flat-LoRA: Gaussian noise in the merged weight, its strength in a row relative to the row's norm.

    eps_ij = rho_t / sqrt(n) * ||W'_i|| * z_ij        (arXiv 2409.14396, eq. 7)
    """

    def forward(self, layer: Any, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return layer.with_noise(plain, x, *args, **kwargs)

    def noise_norms(self, row_norms: Tensor) -> Tensor:
        """What the noise of each row is relative to, (m,), from the row norms of the merged weight, (m,)."""
        return row_norms
