"""The perturbed forward and its gradients equal autograd on the dense expression (invariants 1 and 2)."""

import pytest
import torch
import torch.nn.functional as F
from helpers.layer_cases import CASES, SEED, Case, apply_dense, clean_forward, dense_noise, dense_weight, flat_model
from torch import nn

import flatlora.ops.blocks
from flatlora import perturbation, perturbed

# peft stops the gradient of a padding token to A, but not to B: no dense expression does
PLAIN = [case for case in CASES if not case.config.get("use_dora") and case.name != "embedding-padding"]
names = {"ids": lambda case: case.name}


def gradients(out, layer, x, target):
    leaves = [p for name, p in layer.named_parameters() if "base_layer.weight" not in name and p.requires_grad]
    leaves += [x] if x.is_floating_point() else []
    return torch.autograd.grad(((out - target) ** 2).sum(), leaves, allow_unused=True)


def prepare(case, **config):
    model, layer, x = flat_model(case, **config)
    bias = getattr(layer.get_base_layer(), "bias", None)
    if bias is not None:
        bias.requires_grad_()
    return model, layer, x.requires_grad_() if x.is_floating_point() else x, bias


def assert_same(case, got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            scale = b.abs().max().item() + 1e-30
            assert (a - b).abs().max().item() <= tolerance * max(1.0, scale), case.name


@pytest.mark.parametrize("case", PLAIN, **names)
def test_loss_and_gradients_equal_autograd_on_the_dense_expression(case):
    model, layer, x, bias = prepare(case)
    out = model(x)
    expected = apply_dense(layer, x, dense_weight(layer) + dense_noise(layer), bias)
    target = torch.randn_like(out)
    assert_same(case, [out], [expected], 1e-10)
    assert_same(case, gradients(out, layer, x, target), gradients(expected, layer, x, target), 1e-10)
    clean = apply_dense(layer, x, dense_weight(layer), bias)
    assert (out - clean).abs().max() > 1e-2  # there is noise


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("case", CASES, **names)
def test_with_dropout_and_dora_the_noise_is_added_to_what_peft_computes(case, dropout):
    model, layer, x, _bias = prepare(case, lora_dropout=dropout)
    torch.manual_seed(5)
    out = model(x)
    torch.manual_seed(5)
    expected = clean_forward(model, x) + apply_dense(layer, x, dense_noise(layer), None)
    target = torch.randn_like(out)
    assert_same(case, [out], [expected], 1e-10)
    assert_same(case, gradients(out, layer, x, target), gradients(expected, layer, x, target), 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.06)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, **names)
def test_lower_precisions_agree_within_rounding(case, dtype, tolerance):
    model, layer, x, _bias = prepare(case, dtype=dtype)
    out = model(x)
    target = torch.zeros_like(out)
    got = gradients(out, layer, x, target)
    assert out.dtype == dtype
    noise = dense_noise(layer).to(dtype)
    expected = clean_forward(model, x) + apply_dense(layer, x, noise, None)
    want = gradients(expected, layer, x, target)
    assert_same(case, [out.float()], [expected.float()], tolerance)
    for a, b in zip(got, want, strict=True):
        if b is not None:
            assert torch.linalg.vector_norm((a - b).float()) <= tolerance * torch.linalg.vector_norm(b.float())


@pytest.mark.parametrize("case", CASES, **names)
def test_the_noise_of_each_layer_grows_with_the_schedule(case):
    model, _, x = flat_model(case, schedule="linear", total_steps=4)
    state, clean = perturbation(model), clean_forward(model, x)
    with perturbed(model, sample=0):
        state.progress = 1.0
        full = model(x) - clean
        assert full.abs().max() > 1e-2
        for progress in (0.25, 0.5):
            state.progress = progress
            assert_same(case, [model(x) - clean], [progress * full], 1e-10)


@pytest.mark.parametrize("extra", [((1,), {}), ((), {"scale": 2.0})], ids=["positional", "keyword"])
def test_an_argument_that_the_base_layer_does_not_take_is_refused_as_by_peft(extra):
    _, layer, x = flat_model(CASES[0])
    with pytest.raises(TypeError, match="forward"):
        layer(x, *extra[0], **extra[1])


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_convolutions_with_other_paddings(options):
    # peft's lora_A keeps zero padding, so the expression is written with peft's own clean output
    case = Case("conv2d", lambda: nn.Conv2d(4, 8, 3, **options), (2, 4, 6, 6))
    model, layer, x, _bias = prepare(case)
    base = layer.get_base_layer()
    padded = F.pad(x, (1, 1, 1, 1), mode="constant" if base.padding_mode == "zeros" else base.padding_mode)
    expected = clean_forward(model, x) + F.conv2d(padded, dense_noise(layer))
    out = model(x)
    target = torch.randn_like(out)
    assert_same(case, [out], [expected], 1e-10)
    assert_same(case, gradients(out, layer, x, target), gradients(expected, layer, x, target), 1e-10)


@pytest.mark.parametrize("case", CASES, **names)
def test_many_small_blocks_give_the_same(case, monkeypatch):
    model, layer, x, _ = prepare(case)
    whole = model(x)
    target = torch.randn_like(whole)
    expected = gradients(whole, layer, x, target)
    monkeypatch.setattr(flatlora.ops.blocks, "BLOCK_BYTES", 1)
    monkeypatch.setattr(flatlora.ops.blocks, "ROW_MULTIPLE", 2)
    with perturbed(model, sample=0):  # the backward above has used that sample
        out = model(x)
    assert_same(case, [out], [whole], 1e-12)
    assert_same(case, gradients(out, layer, x, target), expected, 1e-12)


@pytest.mark.parametrize("case", CASES, **names)
def test_the_frozen_weight_is_never_written(case):
    model, layer, x, _ = prepare(case)
    base = layer.get_base_layer()
    before, version = base.weight.detach().clone(), base.weight._version

    def check(*_):
        assert torch.equal(base.weight, before)

    handle = base.register_forward_hook(check)
    out = model(x)
    out.register_hook(check)
    out.sum().backward()
    handle.remove()
    check()
    with torch.no_grad():
        model(x)
    model.eval()(x)
    check()
    assert base.weight._version == version


def test_the_weight_and_the_forward_are_whole_after_an_exception():
    model, layer, x, _ = prepare(CASES[0])
    base = layer.get_base_layer()
    before, attributes = base.weight.detach().clone(), set(base.__dict__)
    with pytest.raises(ValueError, match=r"x must be of shape \(..., 10\), got"):
        model(x[..., :-1])
    assert torch.equal(base.weight, before) and set(base.__dict__) == attributes
    assert torch.equal(model(x), model(x))
    assert not perturbation(model).passes.token()


def test_a_weight_that_trains_gets_its_gradient():
    for case in (CASES[0], next(c for c in CASES if c.name == "conv2d")):
        model, layer, x, bias = prepare(case)
        weight = layer.get_base_layer().weight.requires_grad_()
        noise = dense_noise(layer)
        (got,) = torch.autograd.grad((model(x) ** 2).sum(), [weight])
        (want,) = torch.autograd.grad((apply_dense(layer, x, dense_weight(layer) + noise, bias) ** 2).sum(), [weight])
        assert_same(case, [got], [want], 1e-10)


def test_the_gradient_can_be_differentiated_again():
    model, layer, x, bias = prepare(CASES[0])
    dense = dense_weight(layer) + dense_noise(layer)
    seconds = []
    for out in (model(x), apply_dense(layer, x, dense, bias)):
        (first,) = torch.autograd.grad((out**3).sum(), [x], create_graph=True)
        seconds.append(torch.autograd.grad((first**2).sum(), [x])[0])
    assert_same(CASES[0], seconds[:1], seconds[1:], 1e-9)


@pytest.mark.parametrize("case", [c for c in CASES if not c.tokens], **names)
def test_autocast_runs_in_the_autocast_dtype_with_the_same_noise(case):
    model, _layer, x, _ = prepare(case, dtype=torch.float32)
    full = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
        assert half.dtype == clean_forward(model, x).dtype
    assert (half - full).norm() <= 0.03 * full.norm()
    assert (half - full).norm() < 0.3 * (clean_forward(model, x) - full).norm()  # although there is noise
    half.float().sum().backward()


def test_layers_have_streams_of_their_own_and_a_tied_weight_has_one():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a, self.b, self.head = (
                nn.Embedding(9, 8),
                nn.Linear(8, 8),
                nn.Linear(8, 8),
                nn.Linear(8, 9),
            )
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.b(self.a(self.embed(x))))

    from flatlora import FlatLoraConfig, get_flat_peft_model

    config = FlatLoraConfig(target_modules=["embed", "a", "b", "head"], seed=SEED)
    inner = get_flat_peft_model(Two(), config).base_model.model
    assert inner.embed.stream == inner.head.stream
    assert len({inner.embed.stream, inner.a.stream, inner.b.stream}) == 3
