"""The adapted layer in one node against autograd on the dense expression, and the norms made on the way."""

import pytest
import torch
import torch.nn.functional as F
from ops.noise_cases import key_of

from flatlora.ops import RowNoise, blocks, lora_linear, makes_norms, merged_row_norms, native, perturb_weight
from flatlora.ops.registry import register

KEY, LAYER, SCALING, RELATIVE = key_of(5, 6), 2, 0.7, 0.1
DTYPES = {"fp64": (torch.float64,) * 2, "fp32": (torch.float32,) * 2, "bf16": (torch.bfloat16, torch.float32)}


def problem(base=torch.float64, low=torch.float64, m=9, n=7, r=3, dropped=False):
    """Leaves x, x_d or None, W, b, A, B."""
    torch.manual_seed(1)
    x, W, b = (torch.randn(*shape).to(base).requires_grad_() for shape in ((2, 5, n), (m, n), (m,)))
    A, B = (torch.randn(*shape).to(low).requires_grad_() for shape in ((r, n), (m, r)))
    return x, torch.randn(2, 5, n).to(low).requires_grad_() if dropped else None, W, b, A, B


def product(x, dropped, W, b, A, B, norms, stale=False, **options):
    noise = None if norms is None else RowNoise(norms, RELATIVE, KEY, LAYER, stale)
    return lora_linear(x, W, b, A, B, SCALING, noise, dropped=dropped, **options)


def dense(x, dropped, W, b, A, B, norms):
    weight = W
    if norms is not None:
        zero, std = torch.zeros_like(W), (RELATIVE * norms).to(torch.promote_types(W.dtype, torch.float32))
        eps = perturb_weight(zero, std, KEY, LAYER, dtype=std.dtype)
        weight = (W.to(std.dtype) + eps).to(W.dtype)
    branch = F.linear(F.linear((x if dropped is None else dropped).to(A.dtype), A), B) * SCALING
    return (F.linear(x, weight, b) + branch).to(W.dtype)


def row_norms(W):
    return torch.rand(len(W), dtype=torch.float64 if W.dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropped"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise, block", [(True, 2**24), (True, 64), (False, 2**24)], ids=["", "blocks", "no noise"])
def test_value_and_gradients(monkeypatch, dtype, dropped, noise, block):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    leaves = problem(*DTYPES[dtype], m=150, dropped=dropped)
    norms = row_norms(leaves[2]) if noise else None
    out, expected = product(*leaves, norms), dense(*leaves, norms)
    tolerance = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 2e-2}[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    target, wanted = torch.randn_like(out), [leaf for leaf in leaves if leaf is not None]
    for got, want in zip(*(torch.autograd.grad((y * target).sum(), wanted) for y in (out, expected)), strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() <= 2 * tolerance * want.norm()


@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropped"])
@pytest.mark.parametrize("noise", [True, False], ids=["", "no noise"])
def test_it_is_differentiable_twice(noise, dropped):
    *leaves, norms = *problem(dropped=dropped, m=4, n=3, r=2), torch.rand(4, dtype=torch.float64) if noise else None
    given = [leaf for leaf in leaves if leaf is not None]

    def of(*tensors):
        x, *rest = tensors
        return product(x, rest.pop(0) if dropped else None, *rest, norms, backend="reference")

    assert torch.autograd.gradcheck(of, given)
    assert torch.autograd.gradgradcheck(of, given)


@pytest.mark.parametrize("frozen", range(6))
def test_a_frozen_leaf_changes_no_other_gradient(frozen):
    leaves = problem(dropped=True)
    norms = row_norms(leaves[2])
    expected = torch.autograd.grad(product(*leaves, norms).square().sum(), leaves)
    leaves[frozen].requires_grad_(False)
    rest = [k for k in range(6) if k != frozen]
    got = torch.autograd.grad(product(*leaves, norms).square().sum(), [leaves[k] for k in rest])
    assert all(torch.equal(g, expected[k]) for g, k in zip(got, rest, strict=True))


class Layer:
    calls = 0

    def on_backward(self):
        self.calls += 1


def test_its_backward_calls_the_layer():
    layer, leaves = Layer(), problem()
    out = product(*leaves, row_norms(leaves[2]), owner=register(layer))
    assert layer.calls == 0
    out.sum().backward()
    assert layer.calls == 1


@pytest.mark.skipif(native.LIBRARY is None, reason="the C kernel was not built")
@pytest.mark.parametrize("kernel", range(native.BEST + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m, n, r", [(1, 1, 1), (70, 100, 8), (33, 64, 3), (130, 257, 16)])
def test_norms_made_on_the_way_are_the_norms(dtype, m, n, r, kernel):
    _, _, W, _, A, B = (t if t is None else t.detach() for t in problem(dtype, torch.float32, m, n, r))
    assert makes_norms(W, "auto")
    norms, out = torch.full((m,), float("nan")), torch.empty_like(W)
    options = {"relative": RELATIVE, "kernel": kernel}
    native.perturb(W, norms, KEY, LAYER, out, factors=(B, A, SCALING), **options)
    assert torch.equal(norms, native.merged_row_norms(W, B, A, SCALING, kernel=kernel))
    torch.testing.assert_close(norms, (W.float() + SCALING * B @ A).norm(dim=1), rtol=2e-6, atol=1e-6)
    again = torch.empty_like(W)
    native.perturb(W, norms, KEY, LAYER, again, **options)
    assert torch.equal(out, again)


def test_stale_norms_are_written_and_used():
    leaves = problem(torch.float32, torch.float32, m=20)
    norms = torch.full((20,), float("nan"))
    out = product(*leaves, norms, stale=True)
    expected = merged_row_norms(leaves[2], None, leaves[5].detach(), leaves[4].detach(), SCALING)
    assert torch.equal(norms, expected)
    assert torch.equal(out, product(*leaves, expected))


@pytest.mark.skipif(native.LIBRARY is None, reason="the C kernel was not built")
@pytest.mark.parametrize("kernel", range(native.BEST + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("t, n, r", [(1, 1, 1), (5, 64, 8), (33, 200, 3), (300, 257, 16)])
def test_a_product_is_added_in_float32_and_rounded_once(dtype, t, n, r, kernel):
    out, left, right = torch.randn(t, n).to(dtype), torch.randn(t, r), torch.randn(n, r).T
    exact = out.double() + left.double() @ right.double()
    native.add_product(out, left, right, kernel=kernel)
    error = (out.double() - exact).abs()
    assert (error <= 1e-5 + exact.abs() * torch.finfo(dtype).eps / 2 * 1.001).all()
