"""Row norms belong to the factors of the current call: fast weights, writes through `.data`, replaced parameters."""

import pytest
import torch
from helpers import layer_cases
from helpers.internals import row_norms
from torch import nn
from torch.func import functional_call

from flatlora import FlatLoraConfig, get_flat_peft_model, perturbation, perturbed
from flatlora.layers.flat_layer import flat_layers
from flatlora.training.forward_records import Record

X = torch.randn(8, 16, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def net(**settings):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    settings = {"rho": 0.3, "schedule": "constant", "seed": 3} | settings
    config = FlatLoraConfig(target_modules=["0", "2"], init_lora_weights=False, **settings)
    return get_flat_peft_model(layers, config, autocast_adapter_dtype=False).train()


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def dense_forward(model, sample):
    """The same output from dense noise with freshly computed row norms."""
    out, norms = X, []
    for module in model.base_model.model:
        if isinstance(module, nn.Tanh):
            out = torch.tanh(out)
            continue
        base, s = module.base_layer, module.scaling["default"]
        merged = base.weight + s * module.lora_B["default"].weight @ module.lora_A["default"].weight
        eps = layer_cases.dense_noise(module, sample=sample, rho=0.3, seed=3)
        out = out @ (merged + eps).T + base.bias
        norms.append(merged.norm(dim=1))
    return out


def check(model):
    out = model(X)
    torch.testing.assert_close(out, dense_forward(model, perturbation(model).sample), rtol=1e-9, atol=1e-11)
    return out


def test_a_write_through_data_between_two_passes():
    """SAM by hand: the second pass runs at other weights, and no version counter has moved."""
    model = net()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for _ in range(3):
        check(model).square().mean().backward()
        moved = {p: 0.5 * torch.randn_like(p) for p in trainable(model).values()}
        for p, e in moved.items():
            p.data.add_(e)
        check(model).square().mean().backward()
        for p, e in moved.items():
            p.data.sub_(e)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("accumulation", [False, True])
def test_fast_weights_whose_memory_is_used_again(accumulation):
    """First-order MAML: the fast weights of a task are freed, and those of the next have their addresses."""
    model, reference = net(), net()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
    for task in range(40):
        generator = torch.Generator().manual_seed(task)
        fast = {
            name: p.detach() * (1 + 3 * torch.rand(1, generator=generator, dtype=p.dtype))
            for name, p in trainable(model).items()
        }
        for p in fast.values():
            p.requires_grad_()
        out = functional_call(model, fast, (X,))
        with torch.no_grad():
            for name, p in trainable(reference).items():
                p.copy_(fast[name])
        with perturbed(reference, sample=perturbation(model).sample):
            torch.testing.assert_close(out, reference(X), rtol=1e-12, atol=1e-13)
        torch.autograd.grad(out.square().mean(), list(fast.values()))
        del fast, out
        if not accumulation:
            optimizer.step()


def test_replaced_factors_and_base_weights():
    model = net()
    check(model)
    for layer in flat_layers(model):
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.weight = nn.Parameter(2 * factor.weight.detach())
        layer.base_layer.weight = nn.Parameter(3 * layer.base_layer.weight.detach(), requires_grad=False)
    check(model)
    for layer in flat_layers(model):
        with torch.no_grad():
            layer.base_layer.weight.mul_(2)
    check(model)


def norms_of(layer):
    return (
        layer.base_layer.weight
        + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    ).norm(dim=1)


def test_another_tensor_at_the_same_address_in_the_same_pass():
    """Address and version are those of before; only the tensor is another one."""
    layer = next(flat_layers(net()))
    factor = layer.lora_B["default"]
    factor.weight = nn.Parameter(torch.randn(factor.weight.shape, dtype=torch.double))
    with perturbation(layer).records.running(Record(sample=0, perturbed=True, token=object())):
        torch.testing.assert_close(row_norms(layer), norms_of(layer))
        before = factor.weight
        factor.weight = nn.Parameter(before.data)
        factor.weight.data.mul_(3)
        assert (factor.weight.data_ptr(), factor.weight._version) == (before.data_ptr(), before._version)
        torch.testing.assert_close(row_norms(layer), norms_of(layer))


def test_a_write_through_data_between_two_calls_that_belong_to_no_pass():
    layer = next(flat_layers(net()))
    for _ in range(2):
        with perturbation(layer).records.running(Record(sample=0, perturbed=True, token=None)):
            torch.testing.assert_close(row_norms(layer), norms_of(layer))
        layer.lora_B["default"].weight.data.mul_(3)
