"""Checks of a base layer that is replaced after the adapter was made: noise is added to its own product."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatlora import FlatLoraConfig, perturbed
from flatlora.layers.flat_layer import flat_layers
from helpers.noise import epsilon

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def adapted(config, **settings):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    torch.manual_seed(1)
    return get_peft_model(layers, config(target_modules=["0", "2"], init_lora_weights=False, **settings)).train()


def flat(rho, **settings):
    return adapted(FlatLoraConfig, rho=rho, schedule="constant", seed=3, **settings)


def check_without_strength(change, compiled=False):
    """The forward with rho = 0 equals plain LoRA's, and the forward with a small rho is close to it."""
    torch._dynamo.reset()
    outputs = []
    for model in (adapted(LoraConfig), flat(0.0), flat(1e-6)):
        change(model)
        outputs.append((torch.compile(model, backend="eager") if compiled else model)(X).detach())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-4, atol=1e-4)


def check_noise(change, stored=lambda weight: weight):
    """eps is relative to the rows of the merged weight; `stored` turns the weight into a dense tensor."""
    model = flat(0.5)
    change(model)
    layer = next(flat_layers(model))
    weight = stored(layer.base_layer.weight.detach())
    B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    merged = weight + layer.scaling["default"] * B @ A
    with torch.no_grad(), perturbed(model):
        noisy = layer(torch.eye(64))
    with torch.no_grad():
        clean = layer.eval()(torch.eye(64))
    expected = epsilon(merged, layer.stream, rho=0.5, seed=3)
    torch.testing.assert_close((noisy - clean).T, expected, rtol=1e-4, atol=1e-5)
    assert layer.train()(X).requires_grad
