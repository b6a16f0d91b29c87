"""Random directions of the weights, each stored as a seed.

Row i of a weight, W'_i (n entries), is displaced by t D_i with D_i = u_i z_i, z standard normal and the unit u_i

| noise               | u_i                  |                                                                |
|---------------------|----------------------|----------------------------------------------------------------|
| `filter`            | ||W'_i|| / sqrt(n)   | Flat-LoRA (arXiv 2409.14396, eq. 7): E||D_i||^2 = ||W'_i||^2   |
| `filter_normalized` | ||W'_i|| / ||z_i||   | Li et al. 2018 (arXiv 1712.09913): ||D_i|| = ||W'_i|| exactly  |
| `layer`             | ||W'||_F / sqrt(m n) | one standard deviation for each layer                          |
| `plain`             | 1                    | random weight perturbation, one standard deviation for all     |

The strength rho (or the distance t) is thus a fraction of the row's norm for the first three, and an absolute standard
deviation for the last. z is a function of (seed, direction, name of the layer, i, j): the same for all models, adapters
and strengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from flatlora.ops.perturb import perturb_weight
from flatlora.ops.philox import mix_rank

from ..utils.arguments import shown
from ..utils.dtypes import accumulation_dtype
from .displacement import CHUNK, At, Weight
from .options import Norms, check_noise, check_norms, check_seed

STREAM = 0x0A7A1751  # mixed into the seed: other noise than in training with the same seed


@dataclass
class Directions:
    """The directions of one measurement, with a cache of their units.

    Attributes:
        weights: the weights to displace.
        noise: one of `NOISES`.
        seed: any 64-bit integer.
        norms: row norms of each weight; those of another model displace several models along identical directions.
    """

    weights: list[Weight]
    noise: str
    seed: int
    norms: Norms
    _units: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.noise = check_noise("noise", self.noise)
        self.seed = check_seed("seed", self.seed)
        check_norms("norms", self.norms)
        for weight in self.weights:
            if weight.name not in self.norms:
                names = shown(list(self.norms))
                raise ValueError(f"norms must hold every chosen layer, {weight.name!r} is missing, got {names}")
            if self.norms[weight.name].shape != weight.shape[:1]:
                shape = tuple(self.norms[weight.name].shape)
                raise ValueError(f"norms[{weight.name!r}] must have shape {weight.shape[:1]}, got {shape}")

    def at(self, steps: Sequence[tuple[float, int]]) -> At:
        """The displacement sum_k t_k D(direction_k) of (t_k, direction_k) pairs, as a function for `displaced`."""
        self._forget_all_but({direction for _, direction in steps})

        def displace(weight: Weight, values: Tensor) -> Tensor:
            dtype, out = values.dtype, values
            wide = accumulation_dtype(dtype)
            for k, (t, direction) in enumerate(steps):
                std = t * self.units(weight, direction)
                to = dtype if k == len(steps) - 1 else wide  # the sum is rounded once
                out = perturb_weight(out, std, self.key(direction, std.device), weight.index, dtype=to)
            return out

        return displace

    def key(self, direction: int, device: torch.device) -> Tensor:
        """The key of a direction in the noise stream, (2,) int64."""
        return torch.tensor([mix_rank(self.seed, STREAM), direction], dtype=torch.int64, device=device)

    def _forget_all_but(self, directions: set[int]) -> None:
        """Drop the cached units of all other directions, so that the cache is O(m) per layer."""
        self._units = {key: unit for key, unit in self._units.items() if key[0] in directions}

    def units(self, weight: Weight, direction: int) -> Tensor:
        """The units u of a weight along a direction, (m,)."""
        key = direction, weight.name
        if key not in self._units:
            self._units[key] = self._make_units(weight, direction)
        return self._units[key]

    def _make_units(self, weight: Weight, direction: int) -> Tensor:
        values = weight.values()
        norms = self.norms[weight.name].to(values.device, torch.float64)
        m, n = weight.shape
        if self.noise == "filter":
            unit = norms / math.sqrt(n)
        elif self.noise == "filter_normalized":
            unit = norms / self._noise_norms(weight, direction, values.device)
        elif self.noise == "layer":
            unit = (norms.square().sum() / (m * n)).sqrt().expand(m)
        else:
            unit = torch.ones_like(norms)
        return unit.to(accumulation_dtype(values.dtype)).contiguous()

    def _noise_norms(self, weight: Weight, direction: int, device: torch.device) -> Tensor:
        """||z_i||, (m,), in blocks of rows. Blocks are multiples of 64 rows, so no backend generates a row twice."""
        m, n = weight.shape
        rows = max(64, CHUNK // n // 64 * 64)
        key, norms = self.key(direction, device), []
        for start in range(0, m, rows):
            count = min(rows, m - start)
            zeros, ones = torch.zeros(count, n, device=device), torch.ones(count, device=device)
            z = perturb_weight(zeros, ones, key, weight.index, start)
            norms.append(torch.linalg.vector_norm(z, dim=1, dtype=torch.float64))
        return torch.cat(norms)


class VectorSpace(Protocol):
    """Size, dtype and device of vectors."""

    size: int
    dtype: torch.dtype
    device: torch.device


def probe(space: VectorSpace, seed: int, sample: int) -> Tensor:
    """A standard normal vector of a space, (size,), from a noise stream of its own."""
    n = 4096
    m = math.ceil(space.size / n)
    zeros, ones = torch.zeros(m, n, device=space.device), torch.ones(m, device=space.device)
    key = torch.tensor([mix_rank(seed, STREAM + 1), sample], dtype=torch.int64, device=space.device)
    return perturb_weight(zeros, ones, key, 0).flatten()[: space.size].to(space.dtype)
