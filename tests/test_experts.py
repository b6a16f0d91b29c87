"""Parameters that peft adapts by themselves (`target_parameters`): matrices, and stacks of one matrix per expert."""

import copy
import io

import peft
import pytest
import torch
import torch.nn.functional as F
from layer_cases import RHO, SEED
from test_memory import allocations, saved_bytes
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import flatlora.ops.blocks
from flatlora import (
    BiLoraConfig,
    EFMLoraConfig,
    FlatLoraConfig,
    LoraSamConfig,
    ascent,
    attach,
    detach,
    get_flat_peft_model,
    perturbation,
    unperturbed,
)
from flatlora.ops import perturb_weight
from flatlora.ops.philox import mix_rank

EXPERTS, DIM, HIDDEN = 3, 6, 10
SETTINGS = {"r": 2, "lora_alpha": 8, "target_parameters": ["moe.up", "moe.down", "moe.gate"]}
FLAT = {"rho": RHO, "schedule": "constant", "seed": SEED}


class Moe(nn.Module):
    """Experts stored as (experts, out, in), or as (experts, in, out) where `is_transposed` says so, as transformers
    does; and a gate, which is one matrix."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (DIM, HIDDEN), (HIDDEN, DIM)
        self.up = nn.Parameter(torch.randn(EXPERTS, *(up if is_transposed else up[::-1])))
        self.down = nn.Parameter(torch.randn(EXPERTS, *(down if is_transposed else down[::-1])))
        self.gate = nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, x):
        up, down = (self.up.mT, self.down.mT) if self.is_transposed else (self.up, self.down)
        parts = [F.linear(F.linear(x, up[e]).tanh(), down[e]) for e in range(EXPERTS)]
        share = F.linear(x, self.gate).softmax(dim=-1)
        return (torch.stack(parts, dim=-1) * share[..., None, :]).sum(dim=-1)


class Holder(nn.Module):
    def __init__(self, is_transposed):
        super().__init__()
        self.moe, self.checkpointing = Moe(is_transposed), None

    def forward(self, x):
        if self.checkpointing is None:
            return self.moe(x)
        return checkpoint(self.moe, x, use_reentrant=self.checkpointing)


both_layouts = pytest.mark.parametrize("is_transposed", [False, True], ids=["out-in", "in-out"])


def randomise(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model.train()


def flat_model(is_transposed=False, kind=FlatLoraConfig, dtype=torch.float64, **config):
    torch.manual_seed(1)
    config = kind(**SETTINGS | (FLAT if kind is FlatLoraConfig else {"schedule": "constant"}) | config)
    return randomise(get_flat_peft_model(Holder(is_transposed).to(dtype), config, autocast_adapter_dtype=False))


def plain_model(is_transposed=False):
    torch.manual_seed(1)
    holder = Holder(is_transposed).double()
    return randomise(peft.get_peft_model(holder, peft.LoraConfig(**SETTINGS), autocast_adapter_dtype=False))


def wrappers(model):
    """The nested layers, by the name of their parameter."""
    layer, found = model.base_model.model.moe, {}
    while hasattr(layer, "parameter_name"):
        found[layer.parameter_name], layer = layer, layer.base_layer
    return found


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def merged(layer, adapters=("default",)):
    return layer.get_param() + sum(layer.get_delta_weight(name) for name in adapters)


def noise(layer, weight, sample=0):
    """By its definition: outputs are rows, counted through the experts, each relative to its own norm."""
    weight = weight.detach()
    transposed = weight.ndim == 3 and layer.get_base_layer().is_transposed
    rows = (weight.mT if transposed else weight).reshape(-1, weight.shape[-2 if transposed else -1])
    key = torch.tensor([mix_rank(SEED, 0), sample])
    z = perturb_weight(torch.zeros_like(rows), torch.ones(len(rows), dtype=rows.dtype), key, layer.stream)
    eps = RHO / rows.shape[1] ** 0.5 * rows.norm(dim=1, keepdim=True) * z
    return eps.view(weight.mT.shape).mT if transposed else eps.view(weight.shape)


def dense(model, x, noisy=True, adapters=("default",)):
    weights = {name: merged(layer, adapters) for name, layer in wrappers(model).items()}
    if noisy:
        weights = {name: weight + noise(wrappers(model)[name], weight) for name, weight in weights.items()}
    base = model.base_model.model.moe.get_base_layer()
    return functional_call(Moe(base.is_transposed).to(x.dtype), weights, (x,))


def assert_close(first, second, tolerance=1e-10):
    for a, b in zip(first, second, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max())


@both_layouts
def test_loss_and_gradients_are_those_of_the_dense_expression(is_transposed):
    model = flat_model(is_transposed)
    x = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    assert len({layer.stream for layer in wrappers(model).values()}) == 3
    out, expected = model(x), dense(model, x)
    assert_close([out], [expected])
    leaves, target = [x, *trained(model)], torch.randn_like(out)
    got = torch.autograd.grad(((out - target) ** 2).sum(), leaves)
    assert_close(got, torch.autograd.grad(((expected - target) ** 2).sum(), leaves))
    with unperturbed(model):
        clean = model(x)
    assert_close([clean], [dense(model, x, noisy=False)])
    assert (out - clean).abs().max() > 1e-2


@both_layouts
def test_small_blocks_give_the_same(is_transposed, monkeypatch):
    model, x = flat_model(is_transposed), torch.randn(5, DIM, dtype=torch.float64)
    whole = model(x)
    monkeypatch.setattr(flatlora.ops.blocks, "BLOCK_BYTES", 1)
    monkeypatch.setattr(flatlora.ops.blocks, "ROW_MULTIPLE", 2)
    assert_close([model(x)], [whole], 1e-12)


def test_two_adapters_and_the_deletion_of_one():
    model = flat_model()
    model.add_adapter("second", FlatLoraConfig(**SETTINGS | FLAT))
    model.base_model.set_adapter(["default", "second"])
    randomise(model)
    x = torch.randn(5, DIM, dtype=torch.float64)
    assert len(wrappers(model)) == 3
    assert_close([model(x)], [dense(model, x, adapters=("default", "second"))])
    model.delete_adapter("second")
    assert all(layer.flat_adapters == {"default"} for layer in wrappers(model).values())
    assert_close([model(x)], [dense(model, x)])


@both_layouts
def test_the_frozen_parameters_are_never_written(is_transposed):
    model = flat_model(is_transposed, dtype=torch.bfloat16)
    base = model.base_model.model.moe.get_base_layer()
    before = {name: (p, p.detach().clone()) for name, p in base.named_parameters()}
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for width in (DIM, DIM, DIM + 1):
        try:
            model(torch.randn(5, width, dtype=torch.bfloat16)).square().sum().backward()
        except RuntimeError:
            assert width > DIM
        optimizer.step()
        optimizer.zero_grad()
        assert type(base) is Moe and dict(base.named_parameters()).keys() == before.keys()
    for name, (same, bits) in before.items():
        assert getattr(base, name) is same and torch.equal(same, bits)


@both_layouts
def test_without_strength_it_is_peft_bit_for_bit(is_transposed):
    flat, plain = flat_model(is_transposed, rho=0.0), plain_model(is_transposed)
    for model in (flat, plain):
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        for seed in range(3):
            x = torch.randn(5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(trained(flat), trained(plain), strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(reentrant):
    results = []
    for way in (None, reentrant):
        model = flat_model()
        model.base_model.model.checkpointing = way
        x = torch.randn(5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
        model(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in trained(model))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_noise_costs_a_block_beyond_what_peft_keeps():
    model, x = flat_model(dtype=torch.float32), torch.randn(5, DIM, requires_grad=True)
    with unperturbed(model):
        plain, _keep = saved_bytes(lambda: model(x), set())
    flat, _keep2 = saved_bytes(lambda: model(x), set())
    assert flat <= plain
    peaks = []
    for enabled in (False, True):
        perturbation(model).enabled = enabled
        peaks.append(allocations(lambda: model(x).sum().backward())[1])
    assert peaks[1] <= peaks[0] + 4 * DIM * HIDDEN + 2048  # one expert, and rows


def test_evaluation_is_clean_and_merging_unloads():
    model, x = flat_model(), torch.randn(5, DIM, dtype=torch.float64)
    expected = dense(model, x, noisy=False)
    assert_close([model.eval()(x)], [expected])
    merged = model.train().merge_and_unload()
    assert type(merged.moe) is Moe and not merged._forward_hooks and not merged._forward_pre_hooks
    assert_close([merged(x)], [expected])


def test_attach_detach_copy_and_pickle():
    model = attach(plain_model(), **FLAT)
    x = torch.randn(5, DIM, dtype=torch.float64)
    expected = dense(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_close([other(x)], [expected])
    detach(model)
    assert all(type(layer) is peft.tuners.lora.ParamWrapper for layer in wrappers(model).values())
    assert torch.equal(model(x), plain_model()(x))


def test_the_saved_adapter_is_plain(tmp_path):
    flat_model().save_pretrained(tmp_path)
    keys = peft.utils.load_peft_weights(str(tmp_path)).keys()
    assert keys == peft.get_peft_model_state_dict(plain_model()).keys()
    loaded = peft.PeftModel.from_pretrained(Holder(False).double(), tmp_path)
    assert all(type(layer) is peft.tuners.lora.ParamWrapper for layer in wrappers(loaded).values())


def test_a_dtype_without_arithmetic_is_an_error_and_the_model_is_left_as_it_was():
    holder = Holder(False)
    holder.moe.up = nn.Parameter(holder.moe.up.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="'moe.*its weight is stored as torch.float8_e4m3fn"):
        get_flat_peft_model(holder, FlatLoraConfig(**SETTINGS))
    assert type(holder.moe) is Moe and not holder._forward_pre_hooks


def test_lora_sam_moves_the_factors():
    model, x = flat_model(kind=LoraSamConfig, rho=0.1), torch.randn(5, DIM, dtype=torch.float64)
    with ascent(model):
        model(x).square().sum().backward()
    out = model(x)
    with torch.no_grad():
        for layer in wrappers(model).values():
            for (factor, adapter), offset in layer.offsets.items():
                getattr(layer, factor)[adapter].weight += offset
    assert_close([out], [dense(model, x, noisy=False)])


def test_methods_that_need_one_matrix_are_errors_that_name_the_layer():
    with pytest.raises(ValueError, match="'moe.*not defined for factors that 3 experts share out"):
        flat_model(kind=EFMLoraConfig)
    with pytest.raises(ValueError, match="'moe.*must be linear in the input"):
        flat_model(kind=BiLoraConfig)
    flat_model(kind=EFMLoraConfig, target_parameters=["moe.gate"])
