"""Products with the factors of an adapter, and dropout in them, against brute force and torch."""

import pytest
import torch
import torch.nn.functional as F
from helpers.noise_cases import key_of

from flatlora.ops import Branch, RowNoise, adapted_linear, dora_linear, low_rank, native
from flatlora.ops.fused_lora import masked_branch
from flatlora.ops.low_rank import Dropout, add_low_rank, gather, project

LOW = [torch.bfloat16, torch.float16]
HAS_KERNEL = native.has_factors(torch.zeros(1, 1, dtype=torch.bfloat16), torch.zeros(1, 1))
SHAPES = [(1, 1, 1), (7, 53, 3), (65, 1061, 9), (130, 96, 8), (129, 2049, 16), (0, 5, 2)]


@pytest.fixture
def single_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def operands(t, n, r, dtype, masked):
    torch.manual_seed(t + n)
    x, left, factor = torch.randn(t, n).to(dtype), torch.randn(t, r), torch.randn(r, n)
    dropout = Dropout(torch.rand(t, n) < 0.7, 1 / 0.7) if masked else None
    kept = x.double() * (dropout.mask * torch.tensor(1 / 0.7).double() if masked else 1)
    return x, left, factor, dropout, kept


def error_of(terms, sums):
    """Bound of the rounding errors of float32 sums of so many terms, whose magnitudes have these sums."""
    return (terms + 4) * torch.finfo(torch.float32).eps / 2 * sums


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("t, n, r", SHAPES)
def test_products_are_those_of_float64(t, n, r, dtype, masked):
    x, left, factor, dropout, kept = operands(t, n, r, dtype, masked)
    projected = project(x, factor, torch.float32, True, dropout)
    bound = error_of(n, kept.abs() @ factor.double().abs().T)
    assert projected.dtype == torch.float32 and ((projected - kept @ factor.double().T).abs() <= bound).all()
    gathered = gather(left, x, torch.float32, True, dropout)
    bound = error_of(t, left.double().abs().T @ kept.abs())
    assert gathered.dtype == torch.float32 and ((gathered - left.double().T @ kept).abs() <= bound).all()


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("t, n, r", SHAPES)
def test_a_branch_is_added_and_rounded_once(t, n, r, dtype, masked):
    x, left, factor, dropout, _ = operands(t, n, r, dtype, masked)
    low = left.double() @ factor.double() * (dropout.mask * torch.tensor(1 / 0.7).double() if masked else 1)
    exact, out = x.double() + low, add_low_rank(x, left, factor, dropout=dropout)
    bound = exact.abs() * torch.finfo(dtype).eps / 2 * 1.001 + 1e-4 * torch.finfo(torch.float16).tiny + 1e-5
    assert (out is x or not HAS_KERNEL) and ((out - exact).abs() <= bound).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, single_thread):
    x, left, factor, dropout, _ = operands(300, 700, 8, dtype, True)

    def results():
        products = project(x, factor, torch.float32, True, dropout), gather(left, x, torch.float32, True, dropout)
        return *products, add_low_rank(x.clone(), left, factor, dropout=dropout)

    if HAS_KERNEL:
        one = results()
        torch.set_num_threads(3)
        assert all(map(torch.equal, one, results()))


@torch.no_grad()
def test_infinity_that_is_dropped_is_not_a_number_as_in_torch():
    x = torch.full((4, 600), torch.inf, dtype=torch.bfloat16)
    dropout = Dropout(torch.zeros(4, 600, dtype=torch.bool), 2.0)
    assert project(x, torch.ones(8, 600), torch.float32, True, dropout).isnan().all()


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(3, 5, 512), (129, 640), (1, 512)])
def test_the_mask_is_that_of_torch(shape, p):
    torch.manual_seed(3)
    x, A, B = torch.randn(shape).bfloat16(), torch.zeros(8, shape[-1]), torch.zeros(512, 8)
    torch.manual_seed(4)
    expected, after = F.dropout(x.float(), p), torch.get_rng_state()
    torch.manual_seed(4)
    branch = masked_branch(Branch(A, B, 1.0), x, p)
    if not HAS_KERNEL:
        assert branch is None
        return
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(x.float() * (branch.dropped.mask * torch.tensor(branch.dropped.keep)), expected)


def test_what_the_kernel_is_not_for_draws_nothing():
    x, A, B = torch.randn(4, 512).bfloat16(), torch.zeros(8, 512), torch.zeros(512, 8)
    state = torch.get_rng_state()
    others = [
        (x, A, B, 0.0), (x, A, B, 1.0), (x.float(), A, B, 0.5), (x, A.bfloat16(), B.bfloat16(), 0.5),
        (x[:, :127].contiguous(), A[:, :127], B, 0.5), (x, A, B[:127], 0.5), (x.t().contiguous().t(), A, B, 0.5),
        (x, torch.zeros(low_rank.MAX_RANK + 1, 512), torch.zeros(512, low_rank.MAX_RANK + 1), 0.5),
    ]  # fmt: skip
    for x, A, B, p in others:
        assert masked_branch(Branch(A, B, 1.0), x, p) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert masked_branch(Branch(others[0][1], others[0][2], 1.0), others[0][0], 0.5) is None
    assert torch.equal(torch.get_rng_state(), state)


# ---- the layer ----

M, N, R, NORMS, KEY = 640, 544, 8, torch.rand(640), key_of(5, 6)


def leaves(dtype=torch.bfloat16):
    torch.manual_seed(1)
    x, W = torch.randn(2, 33, N).to(dtype).requires_grad_(), torch.randn(M, N).to(dtype)
    return x, W, torch.randn(R, N).requires_grad_(), torch.randn(M, R).requires_grad_()


def layer(x, W, A, B, dropped=None):
    branches = [Branch(A, B, 0.7, dropped), Branch(A, B, 0.1)]
    return adapted_linear(x, W, None, branches, RowNoise(NORMS, 0.1, KEY, 2))


def gradients(out, of):
    torch.manual_seed(2)
    return torch.autograd.grad((out * torch.randn(out.shape).to(out.dtype)).sum(), of)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
def test_a_wide_layer_and_its_gradients(monkeypatch, dtype, masked):
    """Against the same layer with torch's products, and dropout as a step of its own."""
    x, W, A, B = leaves(dtype)
    mask = torch.rand(x.shape) < 0.8
    out = layer(x, W, A, B, Dropout(mask, 1 / 0.8) if masked else None)
    got = gradients(out, [x, A, B])
    monkeypatch.setattr(low_rank, "MIN_WIDTH", 10**9)
    expected = layer(x, W, A, B, x.float() * (mask * torch.tensor(1 / 0.8)) if masked else None)
    eps = torch.finfo(dtype).eps
    assert (out - expected).norm() <= eps * expected.norm()
    for one, other in zip(got, gradients(expected, [x, A, B]), strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        assert (one - other).norm() <= (eps if one.dtype == dtype else 1e-5) * other.norm()


def test_a_mask_without_the_kernel_and_differentiated_twice():
    torch.manual_seed(1)
    x, A, B = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (2, 3), (4, 2)))
    W, mask = torch.randn(4, 3, dtype=torch.float64), torch.rand(2, 3) < 0.5

    def masked(x, A, B):
        return adapted_linear(x, W, None, [Branch(A, B, 0.7, Dropout(mask, 2.0))])

    expected = F.linear(x, W) + 0.7 * (x * mask * 2.0) @ A.T @ B.T
    torch.testing.assert_close(masked(x, A, B), expected)
    assert torch.autograd.gradcheck(masked, (x, A, B))
    assert torch.autograd.gradgradcheck(masked, (x, A, B))


def test_a_wide_layer_differentiated_twice(monkeypatch):
    """The second derivatives are those of torch's products: the kernel is not used while gradients are recorded."""
    x, W, A, B = leaves()
    dropout = Dropout(torch.rand(x.shape) < 0.8, 1 / 0.8)

    def second():
        inner = torch.autograd.grad(layer(x, W, A, B, dropout).float().square().sum(), [A, B], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in inner), [A, B])

    got = second()
    monkeypatch.setattr(low_rank, "MIN_WIDTH", 10**9)
    for one, other in zip(got, second(), strict=True):
        assert (one - other).norm() <= torch.finfo(torch.bfloat16).eps * other.norm()


def test_wrong_operands():
    x, A, left = torch.zeros(4, 600).bfloat16(), torch.zeros(8, 600), torch.zeros(4, 8)
    for run, name in [
        (lambda: native.project(x, A[:, :5]), "factor must"),
        (lambda: native.project(x, A.double()), "factor must"),
        (lambda: native.gather(left[:3], x), "left must"),
        (lambda: native.project(x.float(), A), "needs a contiguous bfloat16 or float16 matrix"),
        (lambda: native.project(x[:, ::2], A[:, ::2]), "needs a contiguous bfloat16 or float16 matrix"),
        (lambda: native.gather(left, x.float()), "needs a contiguous bfloat16 or float16 matrix"),
        (lambda: native.add_product(x.float(), left, A, torch.ones(4, 600).bool()), "needs a contiguous bfloat16"),
    ]:
        with pytest.raises((ValueError, TypeError), match=name):
            run()
    if HAS_KERNEL:
        for mask in (torch.ones(4, 600), torch.ones(3, 600).bool(), torch.ones(4, 600, device="meta").bool()):
            with pytest.raises((ValueError, TypeError), match="mask must"):
                native.project(x, A, mask)
    x, W, A, B = leaves()
    mask = torch.ones(x.shape).bool()
    for wrong in (Dropout(mask[0], 2.0), Dropout(mask.float(), 2.0)):
        with pytest.raises((ValueError, TypeError), match="mask must"):
            layer(x, W, A, B, wrong)
    with pytest.raises(TypeError, match="keep must"):
        layer(x, W, A, B, Dropout(mask, "2"))
    with pytest.raises(TypeError, match="dropped must be x_d or None for DoRA"):
        dora_linear(x, W, None, Branch(A, B, 0.7, Dropout(mask, 2.0)), NORMS, RowNoise(NORMS, 0.1, KEY, 2))
