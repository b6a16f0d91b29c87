"""Ascent direction of the full weight, expressed as an offset of the factor B (FMLoRA, arXiv 2508.00522).

    G     = 1/2 1/s [ G_B (A^T)^+ + (B^T)^+ G_A ]          estimate of dL/dW from dL/dA and dL/dB (eq. 12)
    E_W   = rho G / ||G||_F                                 (eq. 13)
    E_B   = 1/s E_W A^+                                     (eq. 15)

No m x n matrix is formed. With the r x r matrices P = (A A^T)^+ and Q = (B^T B)^+, (A^T)^+ = P A, (B^T)^+ = B Q and
A^+ = A^T P, so

    G A^+    = 1/(2s) [ G_B P + B Q (G_A A^T) P ]
    ||G||^2  = 1/(4s^2) [ tr(P G_B^T G_B) + tr(Q G_A G_A^T) + 2 tr(P (G_B^T B) Q (G_A A^T)) ]

With B = 0 (or A = 0) one of the two terms is zero; the estimate is then the other one without the factor 1/2.

The terms of ||G||^2 cancel where A or B is ill-conditioned (few examples, a layer with fewer outputs than r), and
float32 products leave nothing of it. The products are then those of float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_CONDITION = 1e3  # of a Gram matrix, for products in float32: they lose 3 of their 7 digits


def full_weight_ascent(
    A: Tensor,  # (..., r, n)
    B: Tensor,  # (..., m, r)
    grad_A: Tensor,  # (..., r, n)
    grad_B: Tensor,  # (..., m, r)
    *,
    scaling: float,
    rho: float,
    rtol: float | None = None,
) -> Tensor:
    """E_B of the steepest ascent of norm rho in the full weight, ``rho/s * G/||G||_F * A^+``.

    Formulas: see `flatlora.ops.ascent`.

    Args:
        A, B, grad_A, grad_B: the factors and their gradients, floating-point, with any number of leading dimensions.
        scaling: s of ``W + s B A``.
        rho: Frobenius norm of E_W, in units of the weight.
        rtol: singular values of A or B below `rtol` times the largest one count as zero. Default: the larger of
            ``k eps`` with the eps of the factors' dtype, and ``sqrt(k 2^-52)``, the resolution of Gram matrices in
            float64; k is the longer side of the factor.

    Returns:
        (..., m, r), float64 for float64 factors, else float32. Zero if the gradient is zero or not finite, or if A or B
        is not finite.
    """
    eps = torch.finfo(A.dtype).eps
    dtype = torch.promote_types(A.dtype, torch.float32)
    A, B, grad_A, grad_B = (tensor.to(dtype) for tensor in (A, B, grad_A, grad_B))
    # normalize the gradient, whose square may overflow or underflow; the result does not depend on its norm
    size = torch.maximum(_largest(grad_A), _largest(grad_B))
    unit = torch.where((size > 0) & size.isfinite(), 1 / size, 0.0)
    grad_A, grad_B = (torch.where(unit > 0, grad * unit, 0.0) for grad in (grad_A, grad_B))

    # the pseudo-inverses and the r x r products with them need float64
    (P, well_A), (Q, well_B) = (_inverse_gram(M, rtol, eps) for M in (A.double(), B.mT.double()))
    E = _scaled_direction(A, B, grad_A, grad_B, P, Q, rho / scaling)
    if dtype == torch.float64:
        return E
    A, B, grad_A, grad_B = (M.double() for M in (A, B, grad_A, grad_B))
    exact = _scaled_direction(A, B, grad_A, grad_B, P, Q, rho / scaling)
    return torch.where((well_A & well_B)[..., None, None], E, exact.to(dtype))


def _scaled_direction(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, P: Tensor, Q: Tensor, size: float
) -> Tensor:
    """``size * G/||G||_F * A^+``, with products in the dtype of the factors."""
    grad_A_A = (grad_A @ A.mT).double()
    squared = _trace(P, (grad_B.mT @ grad_B).double()) + _trace(Q, (grad_A @ grad_A.mT).double())
    squared = squared + 2 * _trace(P @ (grad_B.mT @ B).double(), (Q @ grad_A_A).mT)
    # the factor 1/(2s) of G cancels, and so does 1/s if one of the terms is zero
    scale = torch.where(squared > 0, size / squared.clamp_min(1e-300).sqrt(), 0.0)
    scale = scale[..., None, None]
    E = grad_B @ (P * scale).to(A.dtype) + B @ (Q @ grad_A_A @ P * scale).to(A.dtype)
    return torch.where(scale > 0, E, 0.0)


def _inverse_gram(M: Tensor, rtol: float | None, eps: float) -> tuple[Tensor, Tensor]:
    """(M M^T)^+ of a float64 matrix, and whether M is zero, or has full rank and a small condition number."""
    gram, longest = M @ M.mT, max(M.shape[-2:])
    gram = torch.where(gram.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), gram, 0.0)  # pinv would raise
    smallest = max((longest * eps) ** 2, longest * torch.finfo(torch.float64).eps)
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=smallest if rtol is None else rtol**2)
    condition = torch.linalg.matrix_norm(gram) * torch.linalg.matrix_norm(inverse)
    is_full = (condition < LARGEST_CONDITION) & (_trace(inverse, gram) > M.shape[-2] - 0.5)
    return inverse, is_full | (condition == 0)


def _largest(grad: Tensor) -> Tensor:
    """The largest absolute value of each matrix."""
    largest: Tensor = torch.linalg.vector_norm(grad, ord=float("inf"), dim=(-2, -1), keepdim=True)
    return largest


def _trace(left: Tensor, right: Tensor) -> Tensor:
    """tr(left right^T)."""
    return (left * right).sum(dim=(-2, -1))
