"""The add-and-remove scheme: Flat-LoRA as its authors describe it (arXiv 2409.14396, section 3.3), to compare with.

    before the forward     W <- W + eps      eps_ij = rho / sqrt(n) * ||W'_i|| * z_ij,  z from a generator, seeded
    after the backward     W <- W - eps      the same z, from the same generator, seeded again

Only the seed and the row norms are kept in between. Written to be as fast as the scheme can be with torch's operations:
the norms are this library's, without the merged weight; z is drawn in float32 (torch draws float64 or bfloat16 more
slowly on CPUs) into one buffer for all layers; the sum is one fused pass over W.

What the scheme itself brings with it: W is written, so a low-precision W does not come back exactly, and anything that
reads W between the two, or an exception there, sees the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners import lora
from torch import Tensor, nn

from flatlora.ops import merged_row_norms, squared_row_norms
from flatlora.ops.norms import norm_dtype


class AddAndRemove:
    """Noise that is written into the weights of a model's `lora.Linear` layers, and taken out again.

    Args:
        model: as `peft.get_peft_model` returns it, with one active adapter.
        rho: strength.
        seed: of the first step; every step takes the next one.
    """

    def __init__(self, model: nn.Module, rho: float, seed: int = 0) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, lora.Linear)]
        self.rho, self.seed = rho, seed
        weights = [layer.base_layer.weight for layer in self.layers]
        self.squared = [squared_row_norms(weight) for weight in weights]  # (m,) of each layer; W is frozen
        self.row_std: list[Tensor] = []  # (m,) of each layer, for as long as the noise is in
        self.generator = torch.Generator(device=weights[0].device)
        self.largest = max(weights, key=torch.numel).detach().flatten()

    @torch.no_grad()
    def add(self) -> None:
        """W <- W + eps, with the norms of now."""
        self.row_std = [self._row_std(layer, squared) for layer, squared in zip(self.layers, self.squared, strict=True)]
        self._write(1)

    @torch.no_grad()
    def remove(self) -> None:
        """W <- W - eps."""
        self._write(-1)
        self.row_std = []
        self.seed += 1

    @contextmanager
    def noise(self) -> Iterator[None]:
        """Forward and backward go inside."""
        self.add()
        try:
            yield
        finally:
            self.remove()

    def _row_std(self, layer: lora.Linear, squared: Tensor) -> Tensor:
        weight, name = layer.base_layer.weight, layer.active_adapters[0]
        B = layer.lora_B[name].weight * layer.scaling[name]
        norms = merged_row_norms(weight, squared, B, layer.lora_A[name].weight)
        return (norms * (self.rho / math.sqrt(weight.shape[1]))).to(weight.dtype)

    def _write(self, sign: int) -> None:
        self.generator.manual_seed(self.seed)
        noise = torch.empty_like(self.largest, dtype=norm_dtype(self.largest.dtype))
        rounded = torch.empty_like(self.largest)
        for layer, row_std in zip(self.layers, self.row_std, strict=True):
            weight = layer.base_layer.weight
            z = noise[: weight.numel()].normal_(generator=self.generator)
            if weight.dtype != z.dtype:  # a mixed addcmul_ is many times slower than a cast and a plain one
                z = rounded[: weight.numel()].copy_(z)
            weight.addcmul_(z.view_as(weight), row_std[:, None], value=sign)
