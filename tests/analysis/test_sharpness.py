"""Sharpness: closed forms of a quadratic, and the coverage of the confidence intervals."""

import math

import pytest
import torch
from helpers.landscapes import Quadratic, Snapshot, token_loss, value
from peft import LoraConfig, get_peft_model
from torch import nn

from flatlora import FlatLoraConfig, get_flat_peft_model, perturbation
from flatlora.analysis import Estimate, expected_sharpness, sam_sharpness
from flatlora.analysis.stats import t_quantile


def half_trace(model, noise, rho):
    """tr(H Sigma) / 2 for the noise's covariance Sigma."""
    m, n = model.w0.shape
    norms = model.w0.norm(dim=1)
    variance = {
        "filter": norms.square() / n,
        "filter_normalised": norms.square() / n,  # a direction on the sphere has the covariance of one in the cloud
        "layer": norms.square().sum().expand(m) / (m * n),
        "plain": torch.ones(m),
    }[noise]
    return float(rho**2 / 2 * (variance.repeat_interleave(n) * model.H.diagonal()).sum())


def test_intervals_of_a_quadratic_hold_the_truth_as_often_as_they_say():
    model, trials, level = Quadratic(slope=1.0), 150, 0.8
    truth = half_trace(model, "filter", 0.1)
    hits, means, errors = 0, [], []
    for seed in range(trials):
        result = expected_sharpness(model, value, model.batches, rho=0.1, samples=12, seed=seed)
        low, high = result.interval(level)
        hits += bool(low <= truth <= high)
        means.append(result.mean.item())
        errors.append(result.stderr.item())
    spread = math.sqrt(level * (1 - level) / trials)  # of the rate of hits
    assert level - 4 * spread - 0.03 <= hits / trials <= level + 4 * spread  # 0.03: the samples are skew, chi-squared
    assert abs(sum(means) / trials - truth) < 5 * (sum(e * e for e in errors) ** 0.5 / trials)


@pytest.mark.parametrize("noise", ["filter", "filter_normalised", "layer", "plain"])
def test_every_noise_of_a_quadratic_gives_half_the_trace(noise):
    model = Quadratic(slope=1.0)
    result = expected_sharpness(model, value, model.batches, rho=0.2, samples=300, noise=noise)
    assert abs(result.mean - half_trace(model, noise, 0.2)) < 5 * result.stderr


def test_the_same_noise_at_every_strength_scales_a_quadratic_exactly():
    model = Quadratic(slope=2.0)
    result = expected_sharpness(model, value, model.batches, rho=[0.0, 0.1, 0.2, 0.4], samples=3)
    torch.testing.assert_close(result.rises[:, 3], 16 * result.rises[:, 1], rtol=1e-5, atol=1e-9)
    assert (result.rises[:, 0] == 0).all()


def test_two_models_on_the_same_noise_differ_by_less_than_either_interval():
    a, b = Quadratic(), Quadratic()
    b.H = 1.01 * b.H
    results = [expected_sharpness(m, value, m.batches, rho=[0.1], samples=16) for m in (a, b)]
    difference = results[1].minus(results[0])
    assert difference.stderr < 0.05 * results[0].stderr
    low, high = difference.interval()
    truth = half_trace(b, "filter", 0.1) - half_trace(a, "filter", 0.1)
    assert 0 < low < truth < high
    with pytest.raises(ValueError, match="same number of samples, 16, got 2"):
        results[0].minus(expected_sharpness(a, value, a.batches, rho=[0.1], samples=2))


def test_the_difference_of_two_worst_cases_is_that_of_all_that_was_measured():
    one, two = (
        sam_sharpness(m, value, m.batches, rho=[0.1, 0.2]) for m in (Quadratic(slope=1.0), Quadratic(slope=2.0))
    )
    difference = two.minus(one)
    for name in ("rises", "first_order", "center"):
        assert torch.equal(
            *(torch.as_tensor(x) for x in (getattr(difference, name), getattr(two, name) - getattr(one, name)))
        )
    assert difference.first_order.all()


def test_paired_intervals_hold_the_truth_as_often_as_they_say():
    models, trials, level = [Quadratic(slope=1.0), Quadratic(slope=1.0)], 100, 0.8
    models[1].H = Quadratic(seed=7).H
    truth = half_trace(models[1], "filter", 0.1) - half_trace(models[0], "filter", 0.1)
    hits = 0
    for seed in range(trials):
        a, b = (expected_sharpness(m, value, m.batches, rho=0.1, samples=12, seed=seed) for m in models)
        low, high = b.minus(a).interval(level)
        hits += bool(low <= truth <= high)
    assert abs(hits / trials - level) <= 4 * math.sqrt(level * (1 - level) / trials)


def test_leaves_nothing_behind(net, ids):
    before = Snapshot(net)
    expected_sharpness(net, token_loss, ids, rho=[0.1, 0.5], samples=2)
    before.assert_same()
    with pytest.raises(TypeError):
        expected_sharpness(net, lambda m, b: m(1), ids)
    before.assert_same()


def test_norms_of_another_model():
    model, other = Quadratic(), Quadratic(seed=1)
    norms = {"layer": other.w0.norm(dim=1)}
    result = expected_sharpness(model, value, model.batches, rho=0.1, samples=300, norms=norms)
    truth = float(0.01 / 8 * (norms["layer"].square().repeat_interleave(4) * model.H.diagonal()).sum())
    assert abs(result.mean - truth) < 5 * result.stderr


@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf, [], [0.1, -1.0]])
def test_rho_out_of_bounds(rho):
    model = Quadratic()
    with pytest.raises(ValueError, match="rho must be one or more finite numbers >= 0, got"):
        expected_sharpness(model, value, model.batches, rho=rho)


@pytest.mark.parametrize("samples", [0, True, 2.0])
def test_samples_out_of_bounds(samples):
    model = Quadratic()
    with pytest.raises(ValueError, match="samples must be an integer >= 1, got"):
        expected_sharpness(model, value, model.batches, samples=samples)


@pytest.mark.parametrize(
    "level, degrees, expected",
    [(0.95, 1, 12.7062047362), (0.95, 2, 4.3026527297), (0.9, 5, 2.0150483733), (0.99, 30, 2.7499956536)],
)
def test_student_quantiles(level, degrees, expected):
    """Compare with published tables."""
    assert t_quantile(level, degrees) == pytest.approx(expected, abs=1e-8)
    assert t_quantile(level, 100000) < t_quantile(level, degrees)


def test_estimate():
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 3.0]))
    assert estimate.estimate == 2 and estimate.stderr == pytest.approx(1 / math.sqrt(3))
    assert str(estimate) == "2 ± 0.58"
    assert math.isnan(Estimate.of(torch.tensor([1.0])).stderr)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 95"):
        estimate.interval(95)


def test_a_float32_model_with_large_loss_does_not_lose_the_rise():
    model = nn.Linear(64, 64, bias=False)
    x = [torch.randn(16, 64)]
    result = expected_sharpness(model, lambda m, b: m(b).square().mean(), x, rho=0.05, samples=4)
    torch.testing.assert_close(result.mean / result.center, torch.tensor([0.0025]).double(), rtol=0.2, atol=0)


def worst_rise(model, rho):
    """The maximum of g e + e H e / 2 over ||e|| = rho, by the secular equation (H convex: it is on the sphere)."""
    values, vectors = torch.linalg.eigh(model.H)
    slope = vectors.T @ model.slope
    low, high = values.max().item() + 1e-12, values.max().item() + slope.norm().item() / rho + 1
    for _ in range(200):
        shift = (low + high) / 2
        low, high = (shift, high) if (slope / (shift - values)).norm() > rho else (low, shift)
    e = slope / (shift - values)
    return float(slope @ e + (values * e * e).sum() / 2)


def test_sam_sharpness_of_a_quadratic():
    model = Quadratic(slope=1.0)
    rho = [0.05, 0.5, 2.0]
    first = sam_sharpness(model, value, model.batches, rho=rho)
    g = model.slope / model.slope.norm()
    exact = [r * model.slope.norm() + r * r / 2 * (g @ model.H @ g) for r in rho]
    torch.testing.assert_close(first.mean, torch.tensor(exact).double())
    torch.testing.assert_close(first.first_order[0], torch.tensor(rho).double() * model.slope.norm())
    many = sam_sharpness(model, value, model.batches, rho=rho, steps=60)
    torch.testing.assert_close(many.mean, torch.tensor([worst_rise(model, r) for r in rho]).double(), rtol=1e-4, atol=0)
    assert (many.mean >= first.mean - 1e-12).all() and math.isnan(many.stderr[0])


def test_sam_sharpness_where_the_gradient_vanishes_finds_the_top_eigenvalue():
    model = Quadratic()
    found = sam_sharpness(model, value, model.batches, rho=0.3, steps=100)
    assert found.mean.item() == pytest.approx(0.045 * torch.linalg.eigvalsh(model.H)[-1].item(), rel=1e-3)
    assert found.first_order.item() == 0


def test_sam_sharpness_per_batch_and_together(net, ids):
    before = Snapshot(net)
    apart = sam_sharpness(net, token_loss, ids, rho=[0.0, 0.1], steps=2)
    together = sam_sharpness(net, token_loss, ids, rho=[0.0, 0.1], steps=2, per_batch=False)
    before.assert_same()
    assert apart.rises.shape == (2, 2) and together.rises.shape == (1, 2)
    assert apart.center == pytest.approx(together.center)
    assert apart.mean[1] > together.mean[1] > 0 and apart.mean[0] == 0  # the mean of maxima is above
    with pytest.raises(ValueError, match="steps must be an integer >= 1"):
        sam_sharpness(net, token_loss, ids, steps=0)


def test_sizes_weigh_the_center_and_the_joint_loss_but_not_the_samples(net, ids):
    shares = torch.tensor([0.25, 0.75]).double()
    plain, sized = (sam_sharpness(net, token_loss, ids, rho=[0.1], sizes=sizes) for sizes in (None, [2, 6]))
    centers = torch.tensor([sam_sharpness(net, token_loss, [b], rho=[0.1]).center for b in ids]).double()
    assert torch.equal(sized.rises, plain.rises) and torch.equal(sized.mean, sized.rises.mean(dim=0))
    assert sized.center == pytest.approx(float(shares @ centers))
    together = sam_sharpness(net, token_loss, ids, rho=[0.1], sizes=[1, 3], per_batch=False)
    repeated = sam_sharpness(net, token_loss, [ids[0], *[ids[1]] * 3], rho=[0.1], per_batch=False)
    torch.testing.assert_close(together.rises, repeated.rises, rtol=1e-3, atol=0)


def test_the_merged_space_and_the_adapter_space_differ():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))  # B = 0
    x = [torch.randn(8, 6)]
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    merged = sam_sharpness(model, loss, x, rho=0.1)
    adapter = sam_sharpness(model, loss, x, rho=0.1, space="adapter")
    W = model.base_model.model[0].weight.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad((x[0] @ W.T + model.base_model.model[0].bias).square().mean(), W)
    A, s = model.base_model.model[0].lora_A["default"].weight, model.base_model.model[0].scaling["default"]
    torch.testing.assert_close(merged.first_order.item(), 0.1 * g.norm().item())
    torch.testing.assert_close(adapter.first_order.item(), 0.1 * (s * g @ A.T).norm().item())


def test_a_flat_model_in_the_middle_of_training_is_measured_clean_and_left_alone():
    config = FlatLoraConfig(r=2, target_modules=["0"], rho=0.5, schedule="constant", init_lora_weights=False)
    model = get_flat_peft_model(nn.Sequential(nn.Linear(6, 5)), config).train()
    x = [torch.randn(8, 6)]
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    loss(model, x[0]).backward()
    before, sample = Snapshot(model), perturbation(model).sample
    found = expected_sharpness(model, loss, x, rho=0.3, samples=4)
    worst = sam_sharpness(model, loss, x, rho=0.3)
    before.assert_same()
    assert perturbation(model).sample == sample
    merged = model.merge_and_unload()
    again = expected_sharpness(merged, loss, x, rho=0.3, samples=4), sam_sharpness(merged, loss, x, rho=0.3)
    for one, other in zip((found, worst), again, strict=True):
        torch.testing.assert_close(one.rises, other.rises, rtol=1e-4, atol=1e-6)
