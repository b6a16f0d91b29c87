"""The fused DoRA layer against autograd on the dense expression with constant noise."""

import pytest
import torch
import torch.nn.functional as F
from helpers.noise_cases import key_of
from helpers.rows import Rows

from flatlora.ops import Branch, RowNoise, blocks, dora_linear, perturb_weight
from flatlora.ops.registry import register

KEY, LAYER, SCALING, RELATIVE = key_of(5, 6), 2, 0.7, 0.1
DTYPES = {"fp64": (torch.float64,) * 2, "fp32": (torch.float32,) * 2, "bf16": (torch.bfloat16, torch.float32)}
NAMES = ("x", "dropped", "bias", "A", "B", "magnitude")


def problem(base=torch.float64, low=torch.float64, m=9, n=7, r=3, dropped=False):
    """W, its merged row norms, and the leaves: x, x_d or None, b, A, B, magnitude (some negative, one zero)."""
    torch.manual_seed(1)
    W, x, b = (torch.randn(*shape).to(base) for shape in ((m, n), (2, 5, n), (m,)))
    A, B, magnitude = (torch.randn(*shape).to(low) for shape in ((r, n), (m, r), (m,)))
    magnitude[0] = 0
    x_d = torch.randn(2, 5, n).to(low) if dropped else None
    wide = torch.float64 if base == torch.float64 else torch.float32
    norms = (W.to(wide) + SCALING * (B @ A).to(wide)).norm(dim=1)
    leaves = [leaf if leaf is None else leaf.requires_grad_() for leaf in (x, x_d, b, A, B, magnitude)]
    return W, norms, leaves


def fused(W, norms, x, dropped, b, A, B, magnitude, **options):
    branch, noise = Branch(A, B, SCALING, dropped), RowNoise(norms, RELATIVE, KEY, LAYER)
    return dora_linear(x, W, b, branch, magnitude, noise, **options)


def dense(W, norms, x, dropped, b, A, B, magnitude):
    """peft's expression plus x eps^T."""
    wide, A_, B_ = norms.dtype, A.to(norms.dtype), B.to(norms.dtype)
    std = RELATIVE * magnitude.detach().abs().to(wide)
    eps = perturb_weight(torch.zeros(W.shape, dtype=wide), std, KEY, LAYER)
    gain, x = magnitude.to(wide) / norms, x.to(wide)
    out = F.linear(x, W.to(wide) + eps, b.to(wide))
    inner = x if dropped is None else dropped.to(wide)
    low_rank = F.linear(F.linear(inner, A_), B_) * SCALING
    return (out + (gain - 1) * F.linear(inner, W.to(wide)) + gain * low_rank).to(W.dtype)


@pytest.mark.parametrize("form", ["tensor", "rows"])
@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropped"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [2**24, 64], ids=["", "blocks"])
def test_value_and_gradients(monkeypatch, dtype, dropped, block, form):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    W, norms, leaves = problem(*DTYPES[dtype], m=150, dropped=dropped)
    out, expected = fused(W if form == "tensor" else Rows(W), norms, *leaves), dense(W, norms, *leaves)
    tolerance = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 2e-2}[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=10 * tolerance)
    assert out.dtype == expected.dtype
    target, wanted = torch.randn_like(out), [leaf for leaf in leaves if leaf is not None]
    for got, want in zip(*(torch.autograd.grad((y * target).sum(), wanted) for y in (out, expected)), strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() <= 2 * tolerance * want.norm()


@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropped"])
def test_the_gradient_of_the_magnitude_has_no_noise(dropped):
    W, norms, leaves = problem(dropped=dropped)
    x, x_d, _, A, B, magnitude = leaves
    out = fused(W, norms, *leaves)
    target = torch.randn_like(out)
    inner = x if x_d is None else x_d
    merged = F.linear(inner, W + SCALING * B @ A)
    (found,) = torch.autograd.grad((out * target).sum(), magnitude)
    torch.testing.assert_close(found, ((target * merged).sum(dim=(0, 1)) / norms).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropped"])
def test_it_is_differentiable_twice(dropped):
    W, norms, leaves = problem(dropped=dropped, m=4, n=3, r=2)
    given = [leaf for leaf in leaves if leaf is not None]

    def of(*tensors):
        x, *rest = tensors
        return fused(W, norms, x, rest.pop(0) if dropped else None, *rest, backend="reference")

    # the magnitude determines the noise, which is a constant for autograd and not for a numerical derivative
    constant = [leaf for leaf in given if leaf is not leaves[-1]]
    assert torch.autograd.gradcheck(lambda *tensors: of(*tensors, leaves[-1].detach()), constant)
    assert torch.autograd.gradgradcheck(lambda *tensors: of(*tensors, leaves[-1].detach()), constant)


@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropped"])
def test_second_derivatives_are_those_of_the_expression(dropped):
    W, norms, leaves = problem(dropped=dropped, m=6, n=5)
    given = [leaf for leaf in leaves if leaf is not None]
    second = []
    for function in (fused, dense):
        first = torch.autograd.grad(function(W, norms, *leaves).pow(3).sum(), given, create_graph=True)
        second.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), given))
    for got, want in zip(*second, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", NAMES)
def test_a_frozen_leaf_changes_no_other_gradient(frozen):
    W, norms, leaves = problem(dropped=True)
    expected = dict(zip(NAMES, torch.autograd.grad(fused(W, norms, *leaves).square().sum(), leaves), strict=True))
    leaves[NAMES.index(frozen)].requires_grad_(False)
    rest = [name for name in NAMES if name != frozen]
    wanted = [leaves[NAMES.index(name)] for name in rest]
    got = torch.autograd.grad(fused(W, norms, *leaves).square().sum(), wanted)
    assert all(torch.equal(g, expected[name]) for g, name in zip(got, rest, strict=True))


def test_nothing_of_the_size_of_the_weight_is_saved():
    W, norms, leaves = problem(torch.float32, torch.float32, m=300, n=200)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(W, norms, *leaves)
    assert [t.data_ptr() for t in saved if t.numel() >= W.numel()] == [W.data_ptr()]


def test_its_backward_calls_the_layer():
    calls = []

    class Layer:
        def on_backward(self):
            calls.append(self)

    layer, (W, norms, leaves) = Layer(), problem()
    out = fused(W, norms, *leaves, owner=register(layer))
    assert calls == []
    out.sum().backward()
    assert calls == [layer]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"magnitude": torch.ones(8)}, ValueError, r"magnitude must be of shape \(9,\)"),
        ({"x": torch.ones(2, 6)}, ValueError, r"x must be of shape \(\.\.\., 7\)"),
        ({"A": torch.ones(3, 6)}, ValueError, r"A must be of shape \(3, 7\)"),
        ({"bias": torch.ones(8)}, ValueError, r"bias must be of shape \(9,\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, error, message):
    W, norms, leaves = problem(torch.float32, torch.float32)
    given = dict(zip(NAMES, leaves, strict=True)) | change
    with pytest.raises(error, match=message):
        fused(W, norms, given["x"], None, given["bias"], given["A"], given["B"], given["magnitude"])


def test_norms_cannot_be_computed_in_its_product():
    W, norms, (x, _, b, A, B, magnitude) = problem()
    noise = RowNoise(norms, RELATIVE, KEY, LAYER, compute_norms=True)
    with pytest.raises(ValueError, match="compute_norms must be False for DoRA"):
        dora_linear(x, W, b, Branch(A, B, SCALING), magnitude, noise)
