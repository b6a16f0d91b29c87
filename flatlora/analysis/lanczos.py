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

    The basis Q is kept, and each new vector is orthogonalized against it twice. A Krylov space holds one eigenvector of
    a repeated eigenvalue; `restart` adds another Krylov space, orthogonal to the exhausted ones, as a block of T.

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
        self.block = 0  # index of the first basis vector of the newest Krylov space

    @property
    def last_beta(self) -> float:
        """Norm of the newest product after orthogonalization."""
        return self.betas[-1]

    def step(self) -> bool:
        """Make one product; False if the space was exhausted before and no product was made."""
        if self.exhausted or len(self.alphas) == self.operator.size:
            return False
        product = (self.operator @ self.basis[-1]).clone()  # an operator may return its argument
        scale = float(product.norm())
        self.alphas.append(float(product @ self.basis[-1]))
        self._orthogonalize(product)
        beta = float(product.norm())
        self.betas.append(beta)
        self.exhausted = beta <= 100 * torch.finfo(product.dtype).eps * max(scale, abs(self.alphas[0]))
        if not self.exhausted:
            self.basis.append(product / beta)
        return True

    def restart(self, start: Tensor) -> None:
        """Continue from the part of another vector, (N,), that is orthogonal to the basis; only when exhausted."""
        start = start / start.norm()
        self._orthogonalize(start)
        self.block = len(self.basis)
        self.basis.append(start / start.norm())
        self.betas[-1], self.exhausted = 0.0, False

    def _orthogonalize(self, vector: Tensor) -> None:
        for _ in range(2):
            for q in self.basis:
                vector -= (vector @ q) * q

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (k,) and eigenvectors (k, k) of T, float64."""
        values, vectors = torch.linalg.eigh(self._tridiagonal(0))
        return values, vectors

    def newest_eigenvalues(self) -> Tensor:
        """Eigenvalues of the newest block of T, float64, smallest first."""
        values: Tensor = torch.linalg.eigvalsh(self._tridiagonal(self.block))
        return values

    def _tridiagonal(self, first: int) -> Tensor:
        alphas, betas = (torch.tensor(x, dtype=torch.float64) for x in (self.alphas[first:], self.betas[first:-1]))
        return torch.diag(alphas) + torch.diag(betas, 1) + torch.diag(betas, -1)
