"""A displacement D is added to the merged weight, for every kind of layer."""

import copy
from collections import OrderedDict

import accelerate
import pytest
import torch
import torch.nn.functional as F
from helpers.landscapes import Snapshot
from helpers.layer_cases import CASES, apply_dense, dense_weight, flat_model, merged_norms
from peft import LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from flatlora.analysis import Hessian, expected_sharpness, merged_row_norms, sam_sharpness
from flatlora.analysis.displacement import displaced, find_weights
from flatlora.analysis.merged_norms import all_row_norms


def random_shift(weights):
    """The displacement D of every weight by name, and the `at` that adds it."""
    D = {w.name: torch.randn(w.shape, dtype=w.values().dtype) for w in weights}
    return D, lambda weight, values: values + D[weight.name]


def full(layer, D):
    """D in the layout of `dense_weight`, with grouped convolutions written out over all input channels."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Linear | Conv1D | nn.Embedding):
        return D
    D, groups = D.view(base.weight.shape), base.groups
    out = D.new_zeros(D.shape[0], D.shape[1] * groups, *D.shape[2:])
    for g, rows in enumerate(D.chunk(groups)):
        k = rows.shape[0]
        out[g * k : (g + 1) * k, g * D.shape[1] : (g + 1) * D.shape[1]] = rows
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_displaced_layer_is_the_merged_layer_displaced(case):
    model, layer, x = flat_model(case)
    model.eval()
    weights = find_weights(model)
    D, at = random_shift(weights)
    before = Snapshot(model)
    with torch.no_grad():
        clean = model(x)
        with displaced(weights, at) as used:
            got = model(x)
    assert used == {"layer"}
    expected = clean + apply_dense(layer, x, full(layer, D["layer"]), None)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    if not case.config.get("use_dora"):
        bias = getattr(layer.get_base_layer(), "bias", None)
        torch.testing.assert_close(got, apply_dense(layer, x, dense_weight(layer) + full(layer, D["layer"]), bias))
    torch.testing.assert_close(all_row_norms(weights)["layer"], merged_norms(layer).detach())
    before.assert_same()


@pytest.mark.parametrize("case", [c for c in CASES if "dora" not in c.name], ids=lambda case: case.name)
def test_adapter_space_displaces_the_factors(case):
    model, _layer, x = flat_model(case)
    model.eval()
    weights = find_weights(model, space="adapter")
    assert len(weights) == 2 * len(case.adapters)
    D, at = random_shift(weights)
    with torch.no_grad(), displaced(weights, at):
        got = model(x)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for weight in find_weights(moved, space="adapter"):
            weight.parameter().add_(D[weight.name].view(weight.full_shape))
        torch.testing.assert_close(got, moved(x))


def test_plain_modules_wrapped_modules_and_merged_modules_share_names():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(target_modules=["0", "1"], init_lora_weights=False))
    names = [(w.name, w.index) for w in find_weights(plain)]
    assert [(w.name, w.index) for w in find_weights(model)] == names
    assert [(w.name, w.index) for w in find_weights(model.merge_and_unload())] == names
    partly = get_peft_model(copy.deepcopy(plain), LoraConfig(target_modules=["0"]))
    assert [(w.name, w.index) for w in find_weights(partly)] == names[:1]
    assert [(w.name, w.index) for w in find_weights(partly, "all")] == names


def test_disabled_and_merged_adapters_are_not_counted():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    weights = find_weights(model)
    with_adapter = all_row_norms(weights)["0"]
    with model.disable_adapter():
        torch.testing.assert_close(all_row_norms(weights)["0"], model.base_model.model[0].weight.norm(dim=1))
    model.merge_adapter()
    torch.testing.assert_close(all_row_norms(weights)["0"], with_adapter)


class Packed(nn.Module):
    """A stand-in for a quantized layer: it has no floating-point weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max().item() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_a_quantized_base_is_displaced_additively():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    layer = model.base_model.model[0]
    layer.base_layer = Packed(layer.base_layer)
    weights, x = find_weights(model.eval()), torch.randn(3, 6)
    D, at = random_shift(weights)
    with torch.no_grad():
        clean = model(x)
        with displaced(weights, at):
            torch.testing.assert_close(model(x), clean + x @ D["0"].T)
    merged = layer.base_layer.weight.float() * layer.base_layer.scale + layer.get_delta_weight("default")
    torch.testing.assert_close(all_row_norms(weights)["0"], merged.norm(dim=1).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(r=8, target_modules=["0"], vera_dropout=0.5, d_initial=1.0, init_weights=False),
        LoHaConfig(r=4, target_modules=["0"], module_dropout=0.5, rank_dropout=0.5, alpha=64, init_weights=False),
    ],
    ids=["vera", "loha"],
)
def test_norms_from_outputs_are_those_without_dropout_and_draw_nothing(config):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)), config).train()
    layer = model.base_model.model[0].eval()
    with torch.no_grad():
        merged = layer.get_base_layer().weight + layer.get_delta_weight("default")
    layer.train()
    x, loss = [torch.randn(5, 12)], lambda m, b: m(b).square().mean()
    before = Snapshot(model)
    torch.testing.assert_close(merged_row_norms(model)["0"], merged.norm(dim=1))
    training = expected_sharpness(model, loss, x, rho=0.3, samples=2)
    before.assert_same()
    assert torch.equal(training.rises, expected_sharpness(model.eval(), loss, x, rho=0.3, samples=2).rises)


def test_attention_that_reads_its_weights_itself():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    weights, x = find_weights(layer), torch.randn(2, 3, 8)
    assert {w.name for w in weights} == {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1", "linear2"}
    D, at = random_shift(weights)
    moved = copy.deepcopy(layer)
    with torch.no_grad():
        for weight in find_weights(moved):
            weight.parameter().add_(D[weight.name])
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with displaced(weights, at):
                got = layer(x)
            torch.testing.assert_close(got, moved(x))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_two_names_with_one_hash_get_two_indices(monkeypatch):
    monkeypatch.setattr("zlib.crc32", lambda data: 7)
    assert [w.index for w in find_weights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))] == [7, 8]


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_a_parametrized_weight_is_displaced_and_its_tensors_are_not_written(kind, adapted):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict((name, nn.Linear(5, 5).double()) for name in "abc"))
    plain = copy.deepcopy(model)
    for linear, copied in zip(model, plain, strict=True):
        getattr(parametrizations, kind)(linear)
        with torch.no_grad():
            for parameter in linear.parametrizations.parameters():  # as after training: no longer its own inverse
                parameter.mul_(1.3).add_(0.1 * torch.randn_like(parameter))
            copied.weight.copy_(linear.eval().weight)
    if adapted:
        config = LoraConfig(target_modules=list("abc"), init_lora_weights=False)
        model, plain = (get_peft_model(m, config, autocast_adapter_dtype=False) for m in (model, plain))
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" in k}, strict=False)
    x, v = [torch.randn(4, 5).double()], torch.randn(75).double()
    loss = lambda m, b: torch.tanh(m(b)).square().mean()  # noqa: E731
    before = Snapshot(model.train())
    for measure in (expected_sharpness, sam_sharpness):
        torch.testing.assert_close(measure(model, loss, x, rho=0.5).rises, measure(plain, loss, x, rho=0.5).rises)
    torch.testing.assert_close(Hessian(model, loss, x) @ v, Hessian(plain, loss, x) @ v)
    before.assert_same()


def test_a_weight_that_is_elsewhere_is_an_error():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.empty(0, 3))
    with pytest.raises(ValueError, match=r"'0' \(Linear\): weight must be a whole floating-point matrix.*gather"):
        find_weights(nn.Sequential(layer))


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_an_offloaded_layer_is_an_error(adapted):
    model = nn.Sequential(OrderedDict((name, nn.Linear(3, 3)) for name in "ab"))
    model = get_peft_model(model, LoraConfig(target_modules=["a", "b"])) if adapted else model
    x, loss = [torch.randn(2, 3)], lambda m, b: m(b).square().mean()
    expected = expected_sharpness(model, loss, x, layers=lambda name: name == "b").rises
    accelerate.cpu_offload(dict(model.named_modules())["base_model.model.a" if adapted else "a"])
    with pytest.raises(ValueError, match=r"layer 'a' \(Linear\): its weights must be in memory.*without offloading"):
        expected_sharpness(model, loss, x)
    assert torch.equal(expected_sharpness(model, loss, x, layers=lambda name: name == "b").rises, expected)
