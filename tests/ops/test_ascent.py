"""`full_weight_ascent` equals the paper's dense formulas, and is the steepest ascent."""

import pytest
import torch

from flatlora.ops.ascent import full_weight_ascent


def dense(A, B, grad_A, grad_B, s, rho):
    """(E_W, E_B) of arXiv 2508.00522, eqs. 12, 13, 15."""
    pinv = lambda M: torch.linalg.pinv(M, rtol=1e-7)  # noqa: E731
    G = 0.5 / s * (grad_B @ pinv(A.T) + pinv(B.T) @ grad_A)
    E_W = rho * G / torch.linalg.matrix_norm(G)
    return E_W, E_W @ pinv(A) / s


def matrices(*shapes, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def random(r, m, n, seed):
    return matrices((r, n), (m, r), (r, n), (m, r), seed=seed)


def lower_rank(M, rank):
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("which", ["full", "A deficient", "B deficient", "B zero", "A zero", "both deficient"])
@pytest.mark.parametrize("r", [1, 2, 5, 16, 33, 64])
def test_equals_the_dense_formulas(r, which, seed):
    m, n = 64 + 13 * seed, 70 - seed
    A, B, grad_A, grad_B = random(r, m, n, seed)
    if which in ("A deficient", "both deficient"):
        A = lower_rank(A, max(1, r // 2))
    if which in ("B deficient", "both deficient"):
        B = lower_rank(B, max(1, r // 2))
    A, B = (A * 0 if which == "A zero" else A), (B * 0 if which == "B zero" else B)
    s, rho = 0.25 * (seed + 1) ** 2, 0.07
    E = full_weight_ascent(A, B, grad_A, grad_B, scaling=s, rho=rho)
    E_W, expected = dense(A, B, grad_A, grad_B, s, rho)
    assert abs(torch.linalg.matrix_norm(E_W) - rho) < 1e-12
    assert (E - expected).norm() <= 1e-9 * max(expected.norm(), 1e-300)
    assert E.dtype == torch.float64 and E.shape == B.shape


def test_with_a_surjective_gradient_the_norm_in_the_full_weight_is_rho():
    """Where the row space of G lies in that of A, nothing is lost in the transfer: ||s E_B A||_F = rho."""
    A, _, _, grad_B = random(4, 11, 9, 0)
    E = full_weight_ascent(A, torch.zeros(11, 4).double(), torch.zeros_like(A), grad_B, scaling=3.0, rho=0.2)
    assert abs(torch.linalg.matrix_norm(3.0 * E @ A) - 0.2) < 1e-12


@pytest.mark.parametrize("rank", ["full", "deficient"])
@pytest.mark.parametrize("r", [1, 2, 3, 8, 31, 64])
def test_with_B_zero_it_is_the_steepest_ascent_of_its_size_in_the_full_weight(r, rank):
    """For a linear loss <G, W>: G_B = s G A^T and G_A = s B^T G = 0. Against LoRA-SAM's direction and 100 at random."""
    s, rho, m, n = 1.7, 0.1, 9, 70
    A, B, G, _ = random(r, m, n, r)[0], torch.zeros(m, r).double(), *random(n, m, n, r)[1::2]
    A = lower_rank(A, (r + 1) // 2) if rank == "deficient" else A
    E = full_weight_ascent(A, B, torch.zeros_like(A), s * G @ A.T, scaling=s, rho=rho)
    size, rise = (s * E @ A).norm(), (G * (s * E @ A)).sum()
    assert 0 < size <= rho * (1 + 1e-12)
    for other in [s * G @ A.T, *torch.randn(100, m, r, dtype=torch.float64)]:
        moved = s * other @ A
        assert (G * moved).sum() * size / moved.norm() <= rise * (1 + 1e-12)
    # by Cauchy and Schwarz no E does better than the projection of G onto what E A can be
    assert abs(rise - size * (G @ torch.linalg.pinv(A, rtol=1e-7) @ A).norm()) < 1e-9


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_gradient_does_not_matter(scale):
    A, B, grad_A, grad_B = random(3, 6, 7, 1)
    E = full_weight_ascent(A, B, grad_A, grad_B, scaling=2.0, rho=0.1)
    other = full_weight_ascent(A, B, grad_A * scale, grad_B * scale, scaling=2.0, rho=0.1)
    torch.testing.assert_close(other, E, rtol=1e-12, atol=0)


def test_without_a_gradient_nothing_moves():
    A, B, grad_A, grad_B = random(3, 6, 7, 1)
    assert not full_weight_ascent(A, B, grad_A * 0, grad_B * 0, scaling=2.0, rho=0.1).any()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", range(4))
def test_a_layer_that_is_not_finite_stays_and_the_others_move(place, bad):
    stack = [torch.stack(parts) for parts in zip(random(3, 6, 7, 1), random(3, 6, 7, 2), strict=True)]
    expected = full_weight_ascent(*stack, scaling=2.0, rho=0.1)
    stack[place][0, 2, 1] = bad
    E = full_weight_ascent(*stack, scaling=2.0, rho=0.1)
    assert not E[0].any()
    torch.testing.assert_close(E[1], expected[1])


def test_a_stack_of_layers_is_each_layer_by_itself():
    layers = [random(4, 6, 7, seed) for seed in range(5)]
    layers[2][1].zero_()
    stack = [torch.stack(parts).float() for parts in zip(*layers, strict=True)]
    E = full_weight_ascent(*stack, scaling=0.5, rho=0.1)
    assert E.dtype == torch.float32
    for i in range(5):
        alone = full_weight_ascent(*[part[i] for part in stack], scaling=0.5, rho=0.1)
        torch.testing.assert_close(E[i], alone, rtol=1e-5, atol=1e-8)


def test_the_cut_off_drops_small_singular_values():
    A, B, grad_A, grad_B = random(4, 6, 7, 3)
    U, S, V = torch.linalg.svd(A, full_matrices=False)
    S = torch.tensor([1.0, 0.5, 0.1, 1e-4], dtype=torch.float64)
    small, cut = (U * S) @ V, (U[:, :3] * S[:3]) @ V[:3]
    E = full_weight_ascent(small, B, grad_A, grad_B, scaling=1.0, rho=0.1, rtol=1e-2)
    expected = full_weight_ascent(cut, B, grad_A, grad_B, scaling=1.0, rho=0.1, rtol=1e-2)
    torch.testing.assert_close(E, expected, rtol=2e-3, atol=1e-6)
    assert (full_weight_ascent(small, B, grad_A, grad_B, scaling=1.0, rho=0.1) - expected).norm() > expected.norm()


def exact_ascent(A, B, grad_A, grad_B, scaling, rho):
    """The dense formulas in float64, with the rank that factors of this dtype have."""
    eps = torch.finfo(A.dtype).eps
    pinv = lambda M: torch.linalg.pinv(M.double(), rtol=max(M.shape) * eps)  # noqa: E731
    grad_A, grad_B = grad_A.double(), grad_B.double()
    G = grad_B @ pinv(A.T) + pinv(B.T) @ grad_A
    return rho / scaling * G / G.norm() @ pinv(A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m, n, r", [(1, 64, 8), (2, 30, 8), (30, 3, 8), (30, 3, 16), (4, 4, 16), (64, 8, 64)])
def test_layers_with_fewer_outputs_or_inputs_than_r(m, n, r, dtype):
    A, B, G = (part.to(dtype) for part in matrices((r, n), (m, r), (m, n), seed=r))
    grads = 2.0 * B.T @ G, 2.0 * G @ A.T
    E = full_weight_ascent(A, B, *grads, scaling=2.0, rho=0.1)
    expected = exact_ascent(A, B, *grads, scaling=2.0, rho=0.1)
    assert (E.double() - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("smallest", [1e-2, 1e-3, 3e-4])
def test_an_ill_conditioned_factor_in_float32(smallest):
    """B after a few examples: its columns are nearly the same."""
    U, V, A, G = matrices((20, 4), (4, 4), (4, 30), (20, 30), seed=5)
    U, V = torch.linalg.qr(U)[0], torch.linalg.qr(V)[0]
    B = (U * torch.tensor([1.0, 0.5, 0.1, smallest], dtype=torch.float64)) @ V
    A, B = A.float(), B.float()
    grads = (2.0 * B.double().T @ G).float(), (2.0 * G @ A.double().T).float()
    E = full_weight_ascent(A, B, *grads, scaling=2.0, rho=0.1)
    expected = exact_ascent(A, B, *grads, scaling=2.0, rho=0.1)
    assert E.dtype == torch.float32
    assert (E.double() - expected).norm() < 1e-3 * expected.norm()
