"""Compare Hessian products, eigenvalues, trace and spectrum with dense matrices."""

import copy
import math
import sys

import pytest
import torch
from helpers.landscapes import Quadratic, Snapshot, token_loss, value
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from flatlora.analysis import Hessian, hessian_vector_product, sam_sharpness, spectral_density, top_eigenvalues, trace
from flatlora.analysis.displacement import find_weights


class Dense:
    """A symmetric matrix as an operator."""

    def __init__(self, matrix):
        self.matrix, self.size, self.dtype, self.device = matrix, len(matrix), matrix.dtype, matrix.device

    def __matmul__(self, vector):
        return self.matrix @ vector


def symmetric(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=g, dtype=torch.float64)
    return (a + a.T) / math.sqrt(2 * n)


def dense_hessian(model, loss_fn, batches, **settings):
    """The Hessian over the chosen weights by torch's own double differentiation."""
    weights = find_weights(model, **settings)
    unique = {w.index: w for w in weights}.values()
    values = tuple(w.values().clone() for w in unique)
    names = {id(p): name for name, p in model.named_parameters()}

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return loss_fn(self.model, batch)

    def loss(*rows):
        swap = {f"model.{names[id(w.parameter())]}": w.stored(row) for w, row in zip(unique, rows, strict=True)}
        return sum(torch.func.functional_call(Call(), swap, (batch,)) for batch in batches) / len(batches)

    with sdpa_kernel(SDPBackend.MATH):
        blocks = torch.autograd.functional.hessian(loss, values, vectorize=True)
    sizes = [v.numel() for v in values]
    return torch.cat(
        [torch.cat([blocks[i][j].reshape(n, k) for j, k in enumerate(sizes)], 1) for i, n in enumerate(sizes)]
    )


def assert_hessian(hessian, dense, rounding=1e-10):
    assert hessian.size == len(dense)
    for k in range(3):
        v = torch.randn(hessian.size, dtype=hessian.dtype, generator=torch.Generator().manual_seed(k))
        expected = dense @ v
        assert (hessian @ v - expected).norm() < rounding * expected.norm()


def test_tied_weights_convolution_embedding(net, ids):
    net.double().eval()
    net.train()
    before = Snapshot(net)
    hessian = Hessian(net, token_loss, ids[:1])
    product = hessian @ torch.ones(hessian.size, dtype=torch.float64)
    before.assert_same()
    net.eval()
    assert_hessian(hessian, dense_hessian(net, token_loss, ids[:1]))
    vectors = {n: torch.ones_like(v) for n, v in hessian.split(product).items()}
    assert set(vectors) == {"embedding", "convolution", "linear"}  # the head is the embedding
    torch.testing.assert_close(
        torch.cat([v.flatten() for v in hessian_vector_product(net, token_loss, ids[:1], vectors).values()]), product
    )
    with pytest.raises(ValueError, match="vectors must have the keys"):
        hessian_vector_product(net, token_loss, ids, {})


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_the_same_where_torch_takes_none(net, ids, context):
    def measure():
        hessian = Hessian(net, token_loss, ids)
        sam = sam_sharpness(net, token_loss, ids, rho=0.1, steps=2)
        return hessian @ torch.ones(hessian.size), top_eigenvalues(hessian, steps=3).values, sam.rises, sam.first_order

    expected, before = measure(), Snapshot(net)
    with context():
        found = measure()
    before.assert_same()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)) and expected[0].any()


def test_a_batch_made_in_inference_mode_has_no_gradient():
    model = nn.Linear(3, 2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        sam_sharpness(model, lambda m, b: m(b).square().mean(), [torch.randn(4, 3)])


def tiny_llama():
    config = LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def language_loss(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def test_the_merged_weight_of_a_frozen_base_under_an_adapter():
    ids = [torch.randint(0, 13, (2, 5)) for _ in range(2)]
    targets = LoraConfig(r=2, target_modules=["v_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), targets, autocast_adapter_dtype=False).eval()
    before = Snapshot(model)
    hessian = Hessian(model, language_loss, ids)
    top = top_eigenvalues(hessian, count=2)
    before.assert_same()
    assert (top.residuals < 1e-3 * top.values.abs().max()).all()
    merged = copy.deepcopy(model).merge_and_unload()
    dense = dense_hessian(merged, language_loss, ids, layers=lambda n: n.endswith(("v_proj", "o_proj")))
    assert_hessian(hessian, dense, 1e-4)  # Llama itself rounds its norms and logits to float32
    torch.testing.assert_close(top.values, torch.linalg.eigvalsh(dense).flip(0)[:2], rtol=1e-3, atol=0)
    adapter = Hessian(model, language_loss, ids, space="adapter")
    assert_hessian(adapter, dense_hessian(model, language_loss, ids, space="adapter"), 1e-4)


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_extreme_eigenvalues(count, smallest):
    matrix = symmetric()
    found = top_eigenvalues(Dense(matrix), count, smallest=smallest, tolerance=1e-8, steps=60)
    truth = torch.linalg.eigvalsh(matrix)
    truth = truth[:count] if smallest else truth.flip(0)[:count]
    torch.testing.assert_close(found.values, truth)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(count, dtype=torch.float64))
    assert (found.residuals < 1e-6).all()


def test_residuals_bound_the_error_of_eigenvalues_that_have_not_converged():
    matrix = symmetric(200)
    for seed in range(10):
        found = top_eigenvalues(Dense(matrix), 1, steps=8, seed=seed)
        gap = (torch.linalg.eigvalsh(matrix) - found.values).abs().min()
        assert found.residuals > 1e-6 and gap <= found.residuals + 1e-12


def test_an_operator_of_low_rank_ends_lanczos_early():
    matrix = torch.diag(torch.tensor([3.0, 2.0] + [0.0] * 20, dtype=torch.float64))
    torch.testing.assert_close(top_eigenvalues(Dense(matrix), 2).values, torch.tensor([3.0, 2.0]).double())
    assert spectral_density(Dense(matrix), steps=15).nodes.isnan().any()


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize(
    "matrix, count",
    [
        (diagonal(5, 5, 1, 0), 2),
        (2 * torch.eye(6).double(), 3),
        (diagonal(3, *[0] * 30), 3),
        (diagonal(*[0] * 4), 2),
        (torch.block_diag(*[diagonal(4, 1, -2)] * 3), 4),
        (torch.block_diag(*[symmetric(5)] * 4), 20),
    ],
    ids=["twice", "identity", "rank-1", "zero", "blocks", "all"],
)
def test_repeated_eigenvalues_are_listed_as_often_as_they_occur(matrix, count, smallest):
    found = top_eigenvalues(Dense(matrix), count, smallest=smallest)
    truth = torch.linalg.eigvalsh(matrix)
    truth = truth[:count] if smallest else truth.flip(0)[:count]
    torch.testing.assert_close(found.values, truth, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(count, dtype=torch.float64))
    assert (found.residuals < 1e-8).all()


def test_an_operator_may_return_its_argument():
    class Identity(Dense):
        def __matmul__(self, vector):
            return vector

    found = top_eigenvalues(Identity(torch.eye(5).double()), 2)
    torch.testing.assert_close(found.values, torch.ones(2).double())


def test_trace_intervals_hold_the_truth_as_often_as_they_say():
    matrix, trials, level = symmetric(), 300, 0.9
    found = [trace(Dense(matrix), samples=10, seed=seed) for seed in range(trials)]
    truth = matrix.trace().item()
    hits = sum(low <= truth <= high for low, high in (e.interval(level) for e in found))
    assert abs(hits / trials - level) < 4 * math.sqrt(level * (1 - level) / trials)
    assert trace(Dense(torch.diag(torch.arange(5.0)))).estimate == 10  # signs are exact for a diagonal
    model = Quadratic()
    found = trace(Hessian(model, value, model.batches), samples=100)
    assert abs(found.estimate - model.H.trace()) < 5 * found.stderr


def test_spectral_density_is_that_of_the_matrix():
    matrix, width = symmetric(150), 0.15
    found = spectral_density(Dense(matrix), samples=20, steps=40, width=width)
    truth = torch.linalg.eigvalsh(matrix)
    step = (found.eigenvalues[1] - found.eigenvalues[0]).item()
    assert found.mean.sum() * step == pytest.approx(1, abs=1e-3)
    bumps = torch.exp(-0.5 * ((found.eigenvalues - truth[:, None]) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    exact = bumps.mean(dim=0)
    assert ((found.mean - exact).abs() < 5 * found.stderr + 1e-3).all()
    assert (found.mean - exact).abs().max() < 0.15 * exact.max()


def test_without_curvlinops_the_way_to_get_it_is_said(monkeypatch):
    model = Quadratic()
    monkeypatch.setitem(sys.modules, "curvlinops._torch_base", None)
    with pytest.raises(ImportError, match=r"flatlora\[analysis\].*--no-deps"):
        Hessian(model, value, model.batches).to_curvlinops()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda h: top_eigenvalues(h, 0), "count must be an integer >= 1, got 0"),
        (lambda h: top_eigenvalues(h, 13), "count must be at most the operator's size, 12, got 13"),
        (lambda h: top_eigenvalues(h, 3, steps=2), "steps must be at least count, 3, got 2"),
        (lambda h: trace(h, samples=0), "samples must be an integer >= 1, got 0"),
        (lambda h: spectral_density(h, steps=0), "steps must be an integer >= 1, got 0"),
        (lambda h: h @ torch.ones(3), r"vector must have shape \(12,\), got \(3,\)"),
    ],
)
def test_mistakes_are_answered(call, message):
    model = Quadratic()
    with pytest.raises(ValueError, match=message):
        call(Hessian(model, value, model.batches))
