"""A base layer that becomes another one once the adapter is made: its product stays its own, noise is added."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatlora import FlatLoraConfig, get_flat_peft_model, perturbed
from flatlora.layer import flat_layers

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def adapted(config, **settings):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    torch.manual_seed(1)
    return get_peft_model(layers, config(target_modules=["0", "2"], init_lora_weights=False, **settings)).train()


def flat(rho, **settings):
    return adapted(FlatLoraConfig, rho=rho, schedule="constant", seed=3, **settings)


def bases(model):
    return [layer.base_layer for layer in model.base_model.model if hasattr(layer, "base_layer")]


def ours(module, name):
    return isinstance(module, nn.Linear) and "base_layer" in name


def qat(model):
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    fake = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(model, QATConfig(weight_config=fake, step="prepare"), filter_fn=ours)


def float8(model):
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(model, config=Float8LinearConfig(emulate=True), module_filter_fn=ours)


def int8(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=ours)


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


CHANGES = [qat, float8, int8, patched_forward, another_class, another_module]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, after a graph break
@pytest.mark.parametrize(
    "change, compiled",
    [*((change, False) for change in CHANGES), (patched_forward, True), (another_class, True), (another_module, True)],
    ids=lambda value: getattr(value, "__name__", "compiled" if value else ""),
)
def test_without_strength_the_forward_tends_to_plain_loras(change, compiled):
    torch._dynamo.reset()
    outputs = []
    for model in (adapted(LoraConfig), flat(0.0), flat(1e-6)):
        change(model)
        outputs.append((torch.compile(model, backend="eager") if compiled else model)(X).detach())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [qat, int8, patched_forward, another_class], ids=lambda change: change.__name__)
def test_the_noise_is_that_of_the_merged_weight_as_it_is_stored(change):
    model = flat(0.5)
    change(model)
    layer = next(flat_layers(model))
    weight = layer.base_layer.weight.detach()
    weight = weight.dequantize() if change is int8 else weight
    B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    norms = (weight + layer.scaling["default"] * B @ A).norm(dim=1)
    with torch.no_grad(), perturbed(model):
        noisy = layer(torch.eye(64))
    with torch.no_grad():
        clean = layer.eval()(torch.eye(64))
    eps = (noisy - clean).T
    ratio = eps.norm(dim=1) / (0.5 * norms)  # chi of 64 degrees of freedom over 8: sd 0.09
    assert (ratio - 1).abs().max() < 5 * 0.09
    assert layer.train()(X).requires_grad


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
