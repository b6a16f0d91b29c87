"""The noise by its definition.

    eps_ij = rho_t / sqrt(n) * ||W'_i|| * z(seed, rank, sample, stream, i, j)

W' is the merged weight, of shape (m, n); its rows are the outputs of the layer. The seed is mixed with the
data-parallel rank. z is standard normal; `ops/test_noise.py` tests the words that it comes from.
"""

import torch
from torch import Tensor

from flatlora.ops import perturb_weight
from flatlora.ops.philox import mix_rank


def noise_key(seed: int, sample: int = 0, rank: int = 0) -> Tensor:
    """The int64 tensor (seed mixed with the rank, sample) that the operators take."""
    return torch.tensor([mix_rank(seed, rank), sample])


def unit_noise(
    m: int, n: int, stream: int, *, seed: int, sample: int = 0, rank: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """z, of shape (m, n)."""
    ones = torch.ones(m, dtype=dtype)
    return perturb_weight(torch.zeros(m, n, dtype=dtype), ones, noise_key(seed, sample, rank), stream)


def row_norms(merged: Tensor) -> Tensor:
    """||W'_i||, of shape (m, 1); a constant."""
    return torch.linalg.vector_norm(merged.detach(), dim=1, keepdim=True)


def epsilon(merged: Tensor, stream: int, *, rho: float, norms: Tensor | None = None, **stream_of_z: int) -> Tensor:
    """eps of one layer, of shape (m, n); a constant.

    Args:
        merged: W', of shape (m, n).
        stream: the number of the layer, `layer.stream`.
        rho: rho_t, the strength now.
        norms: ||W'_i|| of shape (m,), where it is not the norm of a row of `merged` (DoRA).
        stream_of_z: `seed`, `sample` and `rank`.
    """
    m, n = merged.shape
    norms = row_norms(merged) if norms is None else norms.detach()[:, None]
    return rho / n**0.5 * norms * unit_noise(m, n, stream, dtype=merged.dtype, **stream_of_z)
