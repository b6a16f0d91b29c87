"""The fused layer with several adapters, or a weight in another form, against autograd on the dense expression."""

import pytest
import torch
import torch.nn.functional as F
from helpers.noise_cases import key_of
from helpers.rows import Rows

from flatlora.ops import Branch, RowNoise, adapted_linear, blocks, makes_norms, native, perturb_weight

KEY, LAYER, RELATIVE = key_of(5, 6), 2, 0.1
M, N, RANKS, SCALINGS = 150, 7, (3, 1, 4), (0.7, 2.0, 0.5)


def problem(base, low, dropped=()):
    """W, b, x and the branches; the indices in `dropped` have inputs of their own."""
    torch.manual_seed(1)
    W, b, x = (torch.randn(*shape).to(base) for shape in ((M, N), (M,), (2, 5, N)))
    branches = [
        Branch(
            torch.randn(r, N).to(low).requires_grad_(),
            torch.randn(M, r).to(low).requires_grad_(),
            scaling,
            torch.randn(2, 5, N).to(low).requires_grad_() if k in dropped else None,
        )
        for k, (r, scaling) in enumerate(zip(RANKS, SCALINGS, strict=True))
    ]
    return W, b.requires_grad_(), x.requires_grad_(), branches


def leaves_of(b, x, branches):
    return [b, x, *(t for branch in branches for t in (branch.A, branch.B, branch.dropped) if t is not None)]


def dense(W, b, x, branches, norms, wide):
    weight = W.to(wide)
    if norms is not None:
        weight = weight + perturb_weight(torch.zeros(M, N, dtype=wide), RELATIVE * norms, KEY, LAYER)
    out = F.linear(x.to(wide), weight, b.to(wide))
    for A, B, scaling, dropped in branches:
        inner = (x if dropped is None else dropped).to(wide)
        out = out + scaling * F.linear(F.linear(inner, A.to(wide)), B.to(wide))
    return out


def close(found, expected, tolerance):
    return (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("form", ["tensor", "rows"])
@pytest.mark.parametrize("dropped", [(), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "base, low, tolerance",
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 2e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("noise, block", [(True, 2**24), (True, 64), (False, 2**24)], ids=["", "blocks", "no noise"])
def test_value_and_gradients(monkeypatch, form, dropped, base, low, tolerance, noise, block):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    W, b, x, branches = problem(base, low, dropped)
    wide = torch.promote_types(base, torch.float32)
    norms = torch.rand(M, dtype=wide) if noise else None
    row_noise = RowNoise(norms, RELATIVE, KEY, LAYER) if noise else None
    out = adapted_linear(x, W if form == "tensor" else Rows(W), b, branches, row_noise)
    expected = dense(W, b, x, branches, norms, wide)
    assert out.dtype == x.dtype
    assert close(out, expected, tolerance)
    target, leaves = torch.randn_like(out), leaves_of(b, x, branches)
    found = torch.autograd.grad((out * target).sum(), leaves)
    wanted = torch.autograd.grad((expected * target).sum(), leaves)
    assert all(g.dtype == leaf.dtype for g, leaf in zip(found, leaves, strict=True))
    assert all(close(g, w, 2 * tolerance) for g, w in zip(found, wanted, strict=True))


def test_it_is_differentiable_twice():
    W, b, x, branches = problem(torch.float64, torch.float64, dropped=(1,))
    W, b, x = W[:4], b[:4].detach().requires_grad_(), x[:1, :2].detach().requires_grad_()
    norms, leaves = torch.rand(4, dtype=torch.float64), []
    for A, B, _, dropped in branches:
        leaves += [A, B[:4].detach().requires_grad_()]
        leaves += [] if dropped is None else [dropped[:1, :2].detach().requires_grad_()]

    def of(b, x, A0, B0, A1, B1, dropped, A2, B2):
        given = zip((A0, A1, A2), (B0, B1, B2), SCALINGS, (None, dropped, None), strict=True)
        noise = RowNoise(norms, RELATIVE, KEY, LAYER)
        return adapted_linear(x, W, b, [Branch(*branch) for branch in given], noise, backend="reference")

    assert torch.autograd.gradcheck(of, (b, x, *leaves))
    assert torch.autograd.gradgradcheck(of, (b, x, *leaves))


def test_without_adapters_it_is_the_perturbed_product():
    W, b, x, _ = problem(torch.float64, torch.float64)
    norms = torch.rand(M, dtype=torch.float64)
    out = adapted_linear(x, W, b, [], RowNoise(norms, RELATIVE, KEY, LAYER))
    assert close(out, dense(W, b, x, [], norms, torch.float64), 1e-12)


@pytest.mark.skipif(native.LIBRARY is None, reason="the C kernel was not built")
@pytest.mark.parametrize("form", ["tensor", "rows"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [2**24, 64], ids=["", "blocks"])
def test_the_kernel_computes_the_norms_of_the_sum_of_all_adapters(monkeypatch, form, base, block):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    W, b, x, branches = problem(base, torch.float32)
    weight = W if form == "tensor" else Rows(W)
    assert makes_norms(weight, "auto")
    norms = torch.full((M,), float("nan"))
    out = adapted_linear(x, weight, b, branches, RowNoise(norms, RELATIVE, KEY, LAYER, compute_norms=True))
    merged = W.float() + sum(s * B @ A for A, B, s, _ in branches).detach()
    torch.testing.assert_close(norms, merged.norm(dim=1), rtol=2e-6, atol=1e-6)
    assert torch.equal(out, adapted_linear(x, weight, b, branches, RowNoise(norms, RELATIVE, KEY, LAYER)))


def test_a_product_of_another_dtype_is_rounded_to_that_of_the_input():
    W, b, x, branches = problem(torch.float32, torch.float32)
    norms, low = torch.rand(M), torch.bfloat16
    noise = RowNoise(norms, RELATIVE, KEY, LAYER)
    out = adapted_linear(x, Rows(W), b.detach().to(low), branches, noise, dtype=low)
    eps = perturb_weight(W, RELATIVE * norms, KEY, LAYER, dtype=low)
    expected = F.linear(x.to(low), eps, b.to(low)).float() + sum(
        s * F.linear(F.linear(x, A), B) for A, B, s, _ in branches
    )
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [[], object()], ids=["list", "object"])
def test_makes_norms_refuses_what_is_no_matrix_on_a_device(rows):
    with pytest.raises(TypeError, match="weight must be a matrix on a device"):
        makes_norms(rows, "auto")
