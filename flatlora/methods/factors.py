"""Methods that act on the factors A and B of a layer: what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..method import Method


class Factors(NamedTuple):
    """The factors of one adapter in one layer that the optimizer is about to change."""

    name: str  # of the layer
    layer: Any
    adapter: str
    A: nn.Parameter
    B: nn.Parameter

    @property
    def scaling(self) -> float:
        return self.layer.scaling[self.adapter]


def trained_factors(state: Any) -> Iterator[Factors]:
    """The factors of the active flat adapters that have a gradient.

    Raises:
        RuntimeError: a factor is made anew in each forward, so that there is no gradient of it.
    """
    for name, layer in state.flat_layers():
        for adapter in layer.active_flat_adapters():
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if not (isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter)):
                if state.rho == 0:
                    continue
                raise RuntimeError(
                    f"{type(state.settings.method).__name__} needs the gradients of lora_A and lora_B, and in "
                    f"{name!r} one of them is made anew in each forward (weight_norm, prune or another "
                    "parametrization). Remove that from the adapter, or use FlatLoraConfig, which needs no gradients."
                )
            if A.grad is not None or B.grad is not None:
                yield Factors(name, layer, adapter, A, B)


def gradient(parameter: nn.Parameter) -> Tensor:
    """Its gradient, zeros if it has none (frozen, or not reached by this backward)."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@dataclass(frozen=True)
class FactorMethod(Method):
    """The forward runs at (A + E_A, B + E_B). A and B are not written: gradients are those at the moved point."""

    uses_gradients = True

    def unsupported(self, layer: Any, adapter: str) -> str | None:
        if layer.use_dora.get(adapter):
            return f"{type(self).__name__} is not defined for DoRA, whose weight is no sum W + sBA"
        if adapter in layer.lora_variant:
            return f"{type(self).__name__} is not defined for {type(layer.lora_variant[adapter]).__name__}"
        if adapter not in layer.lora_A:
            return f"{type(self).__name__} is not defined for embeddings"
        return None

    def forward(self, layer: Any, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with ExitStack() as stack:
            for part in layer.parts():
                stack.enter_context(part.moved(self.offsets(part)))
            return plain(x, *args, **kwargs)

    def offsets(self, layer: Any) -> dict[tuple[str, str], Tensor]:
        """E_A and E_B of the adapters that are active, under ("lora_A", adapter) and ("lora_B", adapter)."""
        active = layer.active_flat_adapters()
        return {key: offset for key, offset in layer.offsets.items() if key[1] in active}
