"""`moved_weight` on a parameter, and on a weight that a pre-hook or a parametrization makes."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad_and_value
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers.pytorch_utils import Conv1D

from flatlora import EFMLoraConfig, FlatLoraConfig, LoraSamConfig, RwpConfig, ascent, get_flat_peft_model, perturbed
from flatlora.layers.module_weights import moved_weight, whole_weight

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


def pruned_twice(module):
    prune.l1_unstructured(module, "weight", 0.3)
    prune.random_unstructured(module, "weight", 0.3)


def watched(module):
    module.register_forward_pre_hook(lambda *_: None)


WAYS = {
    "parameter": lambda module: None,
    "watched": watched,
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
    "prune": pruned_twice,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
HOOKED = [name for name in WAYS if name not in ("parameter", "watched")]
MODULES = {
    "linear": (lambda: nn.Linear(6, 4), torch.randn(3, 6), lambda x, offset: F.linear(x, offset)),
    "conv1d": (lambda: Conv1D(6, 4), torch.randn(3, 4), lambda x, offset: x @ offset),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1), torch.randn(2, 2, 5, 5), lambda x, o: F.conv2d(x, o, padding=1)),
    "embedding": (lambda: nn.Embedding(6, 4), torch.tensor([[0, 5], [3, 3]]), lambda x, offset: F.embedding(x, offset)),
}


def pair(make, way):
    """The same module twice. Its parameters have changed since the weight was last made."""
    modules = []
    for _ in range(2):
        torch.manual_seed(3)
        module = make().double()
        way(module)
        for p in module.parameters():
            p.data.mul_(1.5)
        modules.append(module)
    return modules


@every_way
@pytest.mark.parametrize("make, x, add", MODULES.values(), ids=MODULES)
def test_the_offset_is_added_to_the_weight_of_this_call(make, x, add, way):
    module, twin = pair(make, way)
    offset = torch.randn(make().weight.shape, dtype=torch.float64)
    x = x if x.dtype == torch.int64 else x.double()
    before = [(name, p, p.clone()) for name, p in module.named_parameters()]
    with moved_weight(module, offset):
        got = module(x)
    expected = twin(x) + add(x, offset)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(out.square().sum(), list(m.parameters()))
        for out, m in zip((got, expected), (module, twin), strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert all(p is q and torch.equal(p, bits) for (_, p, bits), q in zip(before, module.parameters(), strict=True))
    assert [name for name, _ in module.named_parameters()] == [name for name, _, _ in before]
    assert torch.equal(module(x), twin(x)) and vars(module).keys() == vars(twin).keys()


@every_way
def test_who_reads_the_weight_without_a_call_finds_it_moved(way):
    module, _ = pair(lambda: nn.Linear(6, 4), way)
    offset = torch.randn(4, 6, dtype=torch.float64)
    module(torch.zeros(6, dtype=torch.float64))
    before = module.eval().weight.clone()
    with moved_weight(module, offset):
        torch.testing.assert_close(module.weight, before + offset, rtol=1e-12, atol=0)
    assert torch.equal(module.weight, before)


def test_a_cached_parametrization_is_moved_and_comes_back():
    module, twin = pair(lambda: nn.Linear(6, 4), parametrizations.weight_norm)
    x, offset = torch.randn(3, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    with parametrize.cached():
        clean = module(x)
        with moved_weight(module, offset):
            torch.testing.assert_close(module(x), clean + F.linear(x, offset), rtol=1e-12, atol=1e-12)
        assert torch.equal(module(x), clean)
    assert torch.equal(clean, twin(x))


def test_a_property_of_the_class_is_an_error():
    module = nn.Linear(3, 3)
    module.__class__ = type("Tied", (nn.Linear,), {"weight": property(lambda self: self.bias.expand(3, 3))})
    with pytest.raises(RuntimeError, match="Tied.weight is a property.*register_parametrization"):
        with moved_weight(module, torch.zeros(3, 3)):
            pass


# ---- errors ----


class Full:
    """An offset that does not fit into memory."""

    is_leaf, requires_grad = True, False

    def to(self, like):
        raise torch.OutOfMemoryError("no more")


@every_way
@pytest.mark.parametrize("where", ["offset", "forward", "body"])
def test_an_error_comes_out_as_it_is_and_nothing_stays_moved(way, where):
    module, twin = pair(lambda: nn.Linear(6, 4), way)
    module.eval(), twin.eval()  # no power iterations
    x, offset = torch.randn(3, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    if where == "forward":
        handle = module.register_forward_hook(lambda *_: Full().to(None))
    with pytest.raises(torch.OutOfMemoryError, match="no more") as error:
        with moved_weight(module, Full() if where == "offset" else offset):
            if where == "body":
                Full().to(None)
            module(x)
    assert error.value.__context__ is None
    if where == "forward":
        handle.remove()
    assert torch.equal(module(x), twin(x)) and vars(module).keys() == vars(twin).keys()


def test_what_a_failing_hook_raises_comes_out():
    module, _ = pair(lambda: nn.Linear(6, 4), weight_norm)
    x = torch.zeros(6, dtype=torch.float64)
    with pytest.raises(AttributeError, match="no attribute 'weight_g'"):
        with moved_weight(module, torch.zeros(4, 6, dtype=torch.float64)):
            del module.weight_g
            module(x)
    module.weight_g = nn.Parameter(torch.ones(4, 1, dtype=torch.float64))
    assert module(x).isfinite().all() and "forward" not in vars(module)


# ---- in a model ----


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def flat(kind=FlatLoraConfig, where="base", way="parameter", **settings):
    """A model of two flat layers. The weight of their `where` is made in this way."""
    torch.manual_seed(2)
    base = Net().double()
    if where == "base":
        for layer in base.children():
            WAYS[way](layer)
    config = kind(r=3, target_modules=["first", "second"], rho=0.3, schedule="constant", **settings)
    model = get_flat_peft_model(base, config, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.4)
    if where != "base":
        for layer in layers(model):
            WAYS[way](getattr(layer, where)["default"])
    return model.train()


def layers(model):
    return [model.base_model.model.first, model.base_model.model.second]


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("way", HOOKED)
@pytest.mark.parametrize("where", ["base", "lora_A", "lora_B"])
@pytest.mark.parametrize("kind", [FlatLoraConfig, RwpConfig], ids=["noise in W", "noise in A and B"])
def test_there_is_noise_and_a_clean_pass_is_that_of_plain_lora(kind, where, way):
    settings = {} if kind is FlatLoraConfig else {"space": "adapter"}
    model, x = flat(kind, where, way, **settings), torch.randn(5, 6, dtype=torch.float64)
    clean = model.eval()(x)
    with perturbed(model, sample=0):
        noisy = model(x)
    assert (noisy - clean).abs().max() > 1e-2
    assert torch.equal(model(x), clean)


@pytest.mark.parametrize("way", [name for name in HOOKED if "spectral" not in name])
def test_noise_in_the_factors_is_that_of_the_same_factors_without_hooks(way):
    model, x = flat(RwpConfig, "lora_A", way, space="adapter"), torch.randn(5, 6, dtype=torch.float64)
    for p in trained(model).values():
        p.data.mul_(1.5)  # after the last time that the hooks made the weights
    plain = flat(RwpConfig, "lora_A", "parameter", space="adapter")
    for mine, own in zip(layers(model), layers(plain), strict=True):
        own.lora_A["default"].weight.data.copy_(whole_weight(mine.lora_A["default"]))
        own.lora_B["default"].weight.data.copy_(mine.lora_B["default"].weight)
    outs = []
    for m in (model, plain):
        with perturbed(m, sample=0):
            outs.append(m(x))
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", [name for name in HOOKED if "spectral" not in name])
def test_a_transform_has_the_noise_and_the_gradients_of_backward(way):
    model, x = flat(way=way), torch.randn(5, 6, dtype=torch.float64)

    def total(parameters):
        return functional_call(model, parameters, (x,)).square().sum()

    gradients, value = grad_and_value(total)(trained(model))
    with perturbed(model):
        expected = model(x).square().sum()
    wanted = torch.autograd.grad(expected, list(trained(model).values()))
    torch.testing.assert_close((value, list(gradients.values())), (expected, list(wanted)), rtol=1e-8, atol=1e-10)
    assert abs(value - model.eval()(x).square().sum()) > 1e-2


@pytest.mark.parametrize("way", HOOKED)
@pytest.mark.parametrize("where", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", [EFMLoraConfig, LoraSamConfig])
def test_a_method_that_needs_the_gradients_of_the_factors_says_that_there_are_none(kind, where, way):
    model, x = flat(kind, where, way), torch.randn(5, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(list(trained(model).values()), lr=0.1)
    with pytest.raises(RuntimeError, match="needs the gradients of lora_A and lora_B.*computed in each forward"):
        with ascent(model) if kind is LoraSamConfig else nullcontext():
            model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("way", HOOKED)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_the_offsets_of_a_method_move_factors_that_are_made_anew(factor, way):
    model, x = flat(LoraSamConfig, factor, way), torch.randn(5, 6, dtype=torch.float64)
    clean = model.eval()(x)
    for layer in layers(model):
        layer.offsets[factor, "default"] = torch.full_like(getattr(layer, factor)["default"].weight, 0.3).detach()
    with perturbed(model):
        moved = model(x)
    factors = [
        [whole_weight(getattr(layer, name)["default"]) for name in ("lora_A", "lora_B")] for layer in layers(model)
    ]
    for layer, pair_ in zip(layers(model), factors, strict=True):
        pair_[factor == "lora_B"] = pair_[factor == "lora_B"] + layer.offsets[factor, "default"]
    expected = x
    for layer, (A, B), last in zip(layers(model), factors, (False, True), strict=True):
        base = layer.base_layer
        expected = F.linear(expected, base.weight + layer.scaling["default"] * B @ A, base.bias)
        expected = expected if last else expected.tanh()
    torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-12)
    assert (moved - clean).abs().max() > 1e-2 and torch.equal(model(x), clean)
