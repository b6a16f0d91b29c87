"""Linear layers that one autograd node computes, against peft's forward with noise in it, which others take."""

import copy

import pytest
import torch
from helpers.two_layers import TwoLayers
from torch import nn

from flatlora import FlatLoraConfig, RwpConfig, get_flat_peft_model
from flatlora.layers import fused
from flatlora.layers.flat_layer import flat_layers

CASES = {
    "one": {},
    "dropout": {"lora_dropout": 0.3},
    "two adapters": {"adapters": 2},
    "three adapters, dropout": {"adapters": 3, "lora_dropout": 0.2},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.3},
    "rwp": {"config": RwpConfig},
}
OTHERS = {
    "dora relative to something else": {"use_dora": True, "config": RwpConfig},
    "two adapters with dora": {"use_dora": True, "adapters": 2},
    "a bias of the adapter": {"lora_bias": True},
}


def flat_model(config=FlatLoraConfig, adapters=1, **options):
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["first", "second"], "rho": 0.2, "schedule": "constant", "seed": 3}
    made = config(**settings | options, init_lora_weights=False)
    model = get_flat_peft_model(TwoLayers().double(), made, autocast_adapter_dtype=False)
    for k in range(1, adapters):
        model.add_adapter(f"more{k}", copy.deepcopy(made), autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", *(f"more{k}" for k in range(1, adapters))])
    return model.double().train()


def run(model):
    """The output and all gradients of one training step."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def takes(model):
    return [fused.operands(layer) is not None for layer in flat_layers(model)]


def without_it(monkeypatch, model):
    monkeypatch.setattr(fused, "operands", lambda layer: None)
    return run(model)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_node_computes_what_peft_does_with_noise_in_its_product(monkeypatch, options):
    model = flat_model(**options)
    assert takes(model) == [True, True]
    assert_equal(run(model), without_it(monkeypatch, model))


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_others_take_another_path(options):
    assert takes(flat_model(**options)) == [False, False]


def test_negative_magnitudes(monkeypatch):
    model = flat_model(use_dora=True)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data[::2] *= -1
    assert_equal(run(model), without_it(monkeypatch, model))


def test_a_base_weight_that_is_trained_under_dora_gets_its_gradient(monkeypatch):
    model = flat_model(use_dora=True)
    weight = model.base_model.model.first.base_layer.weight
    weight.requires_grad_(True)
    assert takes(model) == [False, True]
    found = run(model)
    assert len(found) == 2 + sum(p.requires_grad for p in model.parameters())
    assert_equal(found, without_it(monkeypatch, model))


@pytest.mark.parametrize("where", ["base_layer", "lora_A.default", "lora_magnitude_vector.default"])
def test_a_module_with_a_hook_is_called(monkeypatch, where):
    model, calls = flat_model(use_dora=True), []
    module = model.base_model.model.first.get_submodule(where)
    module.register_forward_hook(lambda *args: calls.append(where))
    assert takes(model) == [False, True]
    model(torch.randn(2, 6, dtype=torch.float64))
    assert calls == [where] * len(calls) != []


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_of_all_modules_run(kind):
    model, calls = flat_model(), []
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda module, *args: calls.append(module))
    try:
        model(torch.randn(2, 6, dtype=torch.float64, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    names = ("base_layer", "lora_A.default", "lora_B.default")
    inside = [layer.get_submodule(name) for layer in flat_layers(model) for name in names]
    assert all(any(module is called for called in calls) for module in inside)
    assert takes(model) == [True, True]


def test_dropout_draws_the_masks_of_peft():
    model = flat_model(adapters=2, lora_dropout=0.5)
    plain = copy.deepcopy(model).eval()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    x = torch.randn(4, 6, dtype=torch.float64)
    states = []
    for one in (model, plain):
        torch.manual_seed(2)
        one(x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
