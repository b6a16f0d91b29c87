"""A base layer that is replaced after the adapter was made computes its own product, and noise is added."""

import pytest
import torch
from helpers.changed_base import X, adapted, check_noise, check_without_strength, flat
from helpers.noise import epsilon
from peft import LoraConfig
from torch import nn

from flatlora import FlatLoraConfig, get_flat_peft_model, perturbed
from flatlora.layers.flat_layer import flat_layers


def bases(model):
    return [layer.base_layer for layer in model.base_model.model if hasattr(layer, "base_layer")]


def patched_forward(model):
    for base in bases(model):
        base.forward = lambda x, forward=base.forward: 2 * forward(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def another_class(model):
    for base in bases(model):
        base.__class__ = Doubled


def another_module(model):
    for layer in flat_layers(model) if any(flat_layers(model)) else list(model.base_model.model)[::2]:
        new = Doubled(layer.in_features, layer.out_features)
        new.load_state_dict(layer.base_layer.state_dict())
        layer.base_layer = new


# the warning is dynamo's own, after a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("change", [patched_forward, another_class, another_module], ids=lambda change: change.__name__)
def test_without_strength_the_forward_tends_to_plain_loras(change, compiled):
    check_without_strength(change, compiled)


@pytest.mark.parametrize("change", [patched_forward, another_class], ids=lambda change: change.__name__)
def test_the_noise_is_that_of_the_merged_weight_as_it_is_stored(change):
    check_noise(change)


class Packed(nn.Module):
    """A linear layer of which each byte has two numbers, as 4-bit formats store them."""

    def __init__(self, linear):
        super().__init__()
        levels = (linear.weight.detach() * 40).round().clamp(-8, 7).to(torch.int32).flatten() + 8
        packed = (levels[::2] * 16 + levels[1::2]).to(torch.uint8)[:, None]
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), linear.bias
        self.in_features = linear.in_features

    def rows(self):
        levels = torch.stack([self.weight[:, 0] // 16, self.weight[:, 0] % 16], dim=1).flatten()
        return (levels.float() - 8).view(-1, self.in_features) / 40

    def forward(self, x):
        return nn.functional.linear(x, self.rows(), self.bias)


def packed_module(model):
    for layer in flat_layers(model) if any(flat_layers(model)) else list(model.base_model.model)[::2]:
        layer.base_layer = Packed(layer.base_layer)


def test_a_weight_in_another_layout_is_perturbed_by_the_product_of_its_module():
    check_without_strength(packed_module)
    model = flat(0.3)
    packed_module(model)
    layer = next(flat_layers(model))
    B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    merged = layer.base_layer.rows() + layer.scaling["default"] * B @ A
    with torch.no_grad(), perturbed(model):
        noisy = layer(torch.eye(64))
    with torch.no_grad():
        clean = layer.eval()(torch.eye(64))
    torch.testing.assert_close((noisy - clean).T, epsilon(merged, layer.stream, rho=0.3, seed=3), rtol=1e-4, atol=1e-5)


def test_training_goes_on_with_gradients_of_what_the_forward_was():
    model, plain = flat(1e-7), adapted(LoraConfig)
    for each in (model, plain):
        another_class(each)
        each(X).square().mean().backward()
    for ours_, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if ours_.grad is not None:
            torch.testing.assert_close(ours_.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_weight_of_another_shape_is_an_error_that_names_both():
    model = flat(0.1)
    layer = next(flat_layers(model))
    layer.base_layer = Doubled(64, 70)
    with pytest.raises(RuntimeError, match=r"is a Doubled now.*shape \(70, 64\), and the adapter is for \(64, 64\)"):
        model(X)


def test_falcons_linear_is_a_product_with_the_transposed_weight():
    from transformers.models.falcon.modeling_falcon import FalconLinear

    outputs = []
    for kind in (nn.Linear, FalconLinear):
        torch.manual_seed(0)
        config = FlatLoraConfig(target_modules=["0"], rho=0.3, schedule="constant", seed=1)
        model = get_flat_peft_model(nn.Sequential(kind(64, 8)), config).train()
        outputs.append(model(X).detach())
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
