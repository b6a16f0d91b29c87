"""Merging and unmerging leaves every bit of the frozen weight as it was."""

import copy
import itertools

import peft
import pytest
import torch
from helpers import versions
from helpers.layer_cases import CASES, flat_model
from torch import nn

from flatlora import FlatLoraConfig, perturbation

ROUNDS = 100
HALF = [torch.bfloat16, torch.float16]
GROUPED = ("groups", "depthwise")  # peft does not merge grouped convolutions
MERGEABLE = [case for case in CASES if not case.name.endswith(GROUPED) and versions.unmerges(case)]


def weights(model):
    return [p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name]


def same(model, before):
    return all(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))


def linear(kind, dtype, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 32)).to(dtype)
    model = peft.get_peft_model(net, kind(target_modules=["0", "1"], r=8, lora_alpha=16, **settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.05)
    return model


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_a_hundred_rounds_in_which_peft_moves_the_weight(dtype):
    flat, plain = linear(FlatLoraConfig, dtype, rho=0.1), linear(peft.LoraConfig, dtype)
    before = weights(flat)
    for _ in range(ROUNDS):
        for model in (flat, plain):
            model.merge_adapter()
            model.unmerge_adapter()
    assert same(flat, before)
    assert not same(plain, before)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", MERGEABLE, ids=lambda case: case.name)
def test_every_layer(case, dtype):
    model, _, _ = flat_model(case, dtype=dtype)
    before = weights(model)
    for _ in range(5):
        model.merge_adapter()
        assert not same(model, before)
        model.unmerge_adapter()
        assert same(model, before)


def test_merged_is_what_peft_merges():
    flat, plain = linear(FlatLoraConfig, torch.bfloat16, rho=0.1), linear(peft.LoraConfig, torch.bfloat16)
    for model in (flat, plain):
        model.merge_adapter()
    assert all(torch.equal(p, q) for p, q in zip(weights(flat), weights(plain), strict=True))


def test_adapters_merged_one_after_the_other_and_a_bias():
    model = linear(FlatLoraConfig, torch.bfloat16, rho=0.1, lora_bias=True)
    model.add_adapter("second", FlatLoraConfig(target_modules=["0", "1"], r=4, rho=0.1))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "second" in name:
                p.normal_(std=0.05)
    before = weights(model)
    for _ in range(3):
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="additionally merging second"):
            model.merge_adapter(["second"])
        model.unmerge_adapter()
        assert same(model, before)


def test_weights_that_merging_swamps_are_kept_by_themselves():
    """Next to a large product, W is lost but for a few bits."""
    model = linear(FlatLoraConfig, torch.bfloat16, rho=0.1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(1000)
    before = weights(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert same(model, before)


def test_what_is_kept_is_one_byte_for_a_weight_and_is_gone_after():
    model = linear(FlatLoraConfig, torch.bfloat16, rho=0.1)
    layer = model.base_model.model[0]
    model.merge_adapter()
    kept = layer._kept.weight
    assert kept.steps.dtype == torch.int8 and kept.steps.shape == layer.base_layer.weight.shape
    assert kept.steps.count_nonzero() > 0 and len(kept.places) < 0.02 * kept.steps.numel()
    model.unmerge_adapter()
    assert "_kept" not in layer.__dict__


def change_a_factor(layer):
    layer.lora_B["default"].weight.mul_(1.5)


def change_a_factor_unseen(layer):
    layer.lora_B["default"].weight.data.mul_(1.5)


def load_a_weight(layer):
    layer.base_layer.weight.copy_(torch.ones(64, 96))


def load_a_weight_unseen(layer):
    layer.base_layer.weight.data.copy_(torch.ones(64, 96))


def change_an_element_unseen(layer):
    layer.base_layer.weight.data[3, 4] += 1


def exchange_rows_unseen(layer):
    layer.base_layer.weight.data.copy_(layer.base_layer.weight.flip(0))


CHANGES = [change_a_factor, change_a_factor_unseen, load_a_weight, load_a_weight_unseen]
CHANGES += [change_an_element_unseen, exchange_rows_unseen]


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_while_merged_is_unmerged_by_peft(change):
    flat, plain = linear(FlatLoraConfig, torch.bfloat16, rho=0.1), linear(peft.LoraConfig, torch.bfloat16)
    for model in (flat, plain):
        model.merge_adapter()
        with torch.no_grad():
            change(model.base_model.model[0])
        model.unmerge_adapter()
    first, second = flat.base_model.model[0], plain.base_model.model[0]
    assert torch.equal(first.base_layer.weight, second.base_layer.weight)


def tied(kind, dtype, **settings):
    """Three layers with one frozen weight."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(48, 48) for _ in range(3))).to(dtype)
    for layer in net[1:]:
        layer.weight = net[0].weight
    model = peft.get_peft_model(net, kind(target_modules=["0", "1", "2"], r=8, lora_alpha=16, **settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.05)
    return model, list(model.base_model.model)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_layers_that_share_a_weight_are_unmerged_in_any_order(dtype, settings):
    """In between, the weight is W with the layers that are still merged, in the order of merging."""
    _model, layers = tied(FlatLoraConfig, dtype, rho=0.1, **settings)
    _other, plain = tied(peft.LoraConfig, dtype, **settings)
    weight, merged = layers[0].base_layer.weight, plain[0].base_layer.weight
    before = weight.detach().clone()
    for order in itertools.permutations(range(3)):
        for layer in layers:
            layer.merge()
        left = [0, 1, 2]
        for index in order:
            layers[index].unmerge()
            left.remove(index)
            merged.data.copy_(before)
            for still in left:
                plain[still].merge()
                plain[still].merged_adapters.clear()
            assert torch.equal(weight, merged)
            assert [bool(layer.merged_adapters) for layer in layers] == [i in left for i in range(3)]


def test_a_second_adapter_merged_below_another_layer():
    model, layers = tied(FlatLoraConfig, torch.bfloat16, rho=0.1)
    model.add_adapter("second", FlatLoraConfig(target_modules=["0", "1", "2"], r=4, rho=0.1, init_lora_weights=False))
    weight = layers[0].base_layer.weight
    before = weight.detach().clone()
    layers[0].merge(adapter_names=["default"])
    layers[1].merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        layers[0].merge(adapter_names=["second"])
    assert layers[0].merged_adapters == ["default", "second"]
    layers[0].unmerge()
    layers[1].unmerge()
    assert torch.equal(weight, before)


def test_two_models_with_the_same_frozen_weights():
    model = linear(FlatLoraConfig, torch.bfloat16, rho=0.1)
    before = weights(model)
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(3 if p.requires_grad else 1)
    for both in (model.merge_adapter, twin.merge_adapter, model.unmerge_adapter, twin.unmerge_adapter):
        both()
    assert same(model, before) and same(twin, before)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_a_restart_after_merging_for_good_as_relora_does(dtype, settings):
    model = linear(FlatLoraConfig, dtype, rho=0.1, **settings)
    for layer in model.base_model.model:
        layer.merge()
        layer.merged_adapters.clear()
        layer.reset_lora_parameters("default", True)
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    before = weights(model)
    model.merge_adapter()
    assert not same(model, before)
    model.unmerge_adapter()
    assert same(model, before)


def test_a_shared_weight_into_which_one_layer_is_merged_for_good():
    """The other layer is unmerged by peft, since W has changed."""
    (_flat_model, flat), (_plain_model, plain) = (
        tied(FlatLoraConfig, torch.bfloat16, rho=0.1),
        tied(peft.LoraConfig, torch.bfloat16),
    )
    for layers in (flat, plain):
        layers[0].merge()
        layers[1].merge()
        layers[1].merged_adapters.clear()
        layers[0].unmerge()
    assert torch.equal(flat[0].base_layer.weight, plain[0].base_layer.weight)


def test_an_adapter_merged_onto_one_that_peft_merged():
    flat, plain = linear(FlatLoraConfig, torch.bfloat16, rho=0.1), linear(peft.LoraConfig, torch.bfloat16)
    for model, kind in ((flat, FlatLoraConfig), (plain, peft.LoraConfig)):
        torch.manual_seed(1)
        model.add_adapter("second", kind(target_modules=["0", "1"], r=4, init_lora_weights=False))
    perturbation(flat).rho = 0
    for model in (flat, plain):
        model.merge_adapter(["default"])
    perturbation(flat).rho = 0.1
    for model in (flat, plain):
        with pytest.warns(UserWarning, match="additionally merging second"):
            model.merge_adapter(["second"])
        model.unmerge_adapter()
    assert all(torch.equal(p, q) for p, q in zip(weights(flat), weights(plain), strict=True))


def test_with_rho_zero_it_is_peft():
    flat, plain = linear(FlatLoraConfig, torch.bfloat16, rho=0.0), linear(peft.LoraConfig, torch.bfloat16)
    for model in (flat, plain):
        for _ in range(5):
            model.merge_adapter()
            model.unmerge_adapter()
    assert all(torch.equal(p, q) for p, q in zip(weights(flat), weights(plain), strict=True))


def test_a_copy_of_a_merged_model_unmerges_by_itself_and_unloading_keeps_nothing():
    model = linear(FlatLoraConfig, torch.bfloat16, rho=0.1)
    before = weights(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert same(twin, before)
    model.unmerge_adapter()
    assert same(model, before)
    layer = model.base_model.model[0]
    model.merge_and_unload()
    assert "_kept" not in layer.__dict__


def test_training_between_the_rounds_as_grpo_does():
    model = linear(FlatLoraConfig, torch.bfloat16, rho=0.1, schedule="constant")
    before = weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(10):
        model.merge_adapter()
        with torch.no_grad():
            model.eval()(torch.randn(2, 96).bfloat16())
        model.unmerge_adapter()
        model.train()(torch.randn(4, 96).bfloat16()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert perturbation(model).steps == step + 1
    assert same(model, before)
