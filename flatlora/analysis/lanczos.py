"""Lanczos iteration on a symmetric operator that is known by its products."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """A symmetric matrix of size N, known by its products with vectors."""

    size: int
    dtype: torch.dtype
    device: torch.device

    def __matmul__(self, vector: Tensor) -> Tensor:
        """The product, (N,)."""


class Lanczos:
    """H Q = Q T + beta q e^T with T tridiagonal.

    The basis Q is kept, and each new vector is orthogonalized against it twice.

    Args:
        operator: H.
        start: the first basis vector, (N,), of any norm > 0.
    """

    def __init__(self, operator: Operator, start: Tensor) -> None:
        self.operator = operator
        self.basis = [start / start.norm()]
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.exhausted = False  # the basis spans an invariant subspace

    @property
    def last_beta(self) -> float:
        """Norm of the newest product after orthogonalization."""
        return self.betas[-1]

    def step(self) -> bool:
        """Make one product; False if the space was exhausted before and no product was made."""
        if self.exhausted or len(self.alphas) == self.operator.size:
            return False
        product = self.operator @ self.basis[-1]
        scale = float(product.norm())
        self.alphas.append(float(product @ self.basis[-1]))
        for _ in range(2):
            for q in self.basis:
                product -= (product @ q) * q
        beta = float(product.norm())
        self.betas.append(beta)
        self.exhausted = beta <= 100 * torch.finfo(product.dtype).eps * max(scale, abs(self.alphas[0]))
        if not self.exhausted:
            self.basis.append(product / beta)
        return True

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (k,) and eigenvectors (k, k) of T, float64."""
        off = torch.tensor(self.betas[:-1], dtype=torch.float64)
        T = torch.diag(torch.tensor(self.alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(T)
        return values, vectors
