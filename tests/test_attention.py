"""torch's MultiheadAttention: eps in the in_proj and the out_proj that peft merges for each call."""

import copy
import io

import peft
import pytest
import torch
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
    perturbed,
    unperturbed,
)
from flatlora.ops import perturb_weight
from flatlora.ops.philox import mix_rank

DIM = 8
SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["attention"]}
FLAT = {"rho": RHO, "schedule": "constant", "seed": SEED}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.checkpointing = nn.MultiheadAttention(DIM, 2, batch_first=True), None

    def attend(self, x):
        return self.attention(x, x, x, need_weights=False)[0]

    def forward(self, x):
        if self.checkpointing is None:
            return self.attend(x)
        return checkpoint(self.attend, x, use_reentrant=self.checkpointing)


class Odd(nn.Linear):
    def forward(self, x):
        return x


def randomise(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model.train()


def flat_model(kind=FlatLoraConfig, dtype=torch.float64, **config):
    torch.manual_seed(1)
    config = kind(**SETTINGS | (FLAT if kind is FlatLoraConfig else {"schedule": "constant"}) | config)
    model = randomise(get_flat_peft_model(Block().to(dtype), config, autocast_adapter_dtype=False))
    return model, model.base_model.model.attention


def plain_model():
    torch.manual_seed(1)
    return randomise(peft.get_peft_model(Block().double(), peft.LoraConfig(**SETTINGS), autocast_adapter_dtype=False))


def frozen(attention):
    return attention.base_layer.in_proj_weight, attention.base_layer.out_proj.base_layer.weight


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def merged_weights(attention, offsets=None):
    """W' of in_proj and out_proj with the graph of A and B. peft counts out_proj's sBA twice in the value (it merges by
    hand and then calls merge) and once in the gradient; merged adapters do, too, so that is the model there is."""
    first, second = (weight + layer.get_delta_weight("default") for weight, layer in parts(attention))
    return first, second + parts(attention)[1][1].get_delta_weight("default").detach()


def parts(attention):
    return list(zip(frozen(attention), (attention, attention.base_layer.out_proj), strict=True))


def noise(weight, stream, sample=0):
    weight = weight.detach()
    key = torch.tensor([mix_rank(SEED, 0), sample])
    z = perturb_weight(torch.zeros_like(weight), torch.ones(len(weight), dtype=weight.dtype), key, stream)
    return RHO / weight.shape[1] ** 0.5 * weight.norm(dim=1, keepdim=True) * z


def dense(attention, x, first, second):
    base = attention.base_layer
    bias = {"in_proj_bias": base.in_proj_bias, "out_proj.bias": base.out_proj.base_layer.bias}
    stock = nn.MultiheadAttention(DIM, 2, batch_first=True).to(x.dtype)
    return functional_call(stock, {"in_proj_weight": first, "out_proj.weight": second, **bias}, (x, x, x))[0]


def assert_close(first, second, tolerance=1e-10):
    for a, b in zip(first, second, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max())


def test_loss_and_gradients_are_those_of_the_dense_expression():
    model, attention = flat_model()
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    first, second = merged_weights(attention)
    assert attention.stream != attention.base_layer.out_proj.stream
    first = first + noise(first, attention.stream)
    second = second + noise(second, attention.base_layer.out_proj.stream)
    out, expected = model(x), dense(attention, x, first, second)
    assert_close([out], [expected])
    leaves, target = [x, *trained(model)], torch.randn_like(out)
    got = torch.autograd.grad(((out - target) ** 2).sum(), leaves)
    assert_close(got, torch.autograd.grad(((expected - target) ** 2).sum(), leaves))
    with unperturbed(model):
        clean = model(x)
    assert_close([clean], [dense(attention, x, *merged_weights(attention))])
    assert (out - clean).abs().max() > 1e-2


def test_small_blocks_give_the_same(monkeypatch):
    model, _ = flat_model()
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    whole = model(x)
    monkeypatch.setattr(flatlora.ops.blocks, "BLOCK_BYTES", 1)
    monkeypatch.setattr(flatlora.ops.blocks, "ROW_MULTIPLE", 2)
    assert_close([model(x)], [whole], 1e-12)


def test_the_frozen_weights_are_put_back_bit_for_bit():
    """Also where the call fails. peft's own clean forward subtracts what it has added."""
    model, attention = flat_model(dtype=torch.bfloat16)
    names, bits = [name for name, _ in model.named_parameters()], [weight.clone() for weight in frozen(attention)]
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for width in (DIM, DIM, DIM - 1):
        before = frozen(attention)
        try:
            model(torch.randn(2, 5, width, dtype=torch.bfloat16)).square().sum().backward()
        except (AssertionError, RuntimeError):
            assert width < DIM
        assert all(weight is same for weight, same in zip(frozen(attention), before, strict=True))
        assert not attention.merged and not attention.base_layer.out_proj.merged
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(weight, same) for weight, same in zip(frozen(attention), bits, strict=True))


def test_without_strength_it_is_peft_bit_for_bit():
    (flat, _), plain = flat_model(rho=0.0), plain_model()
    for model in (flat, plain):
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        for seed in range(3):
            x = torch.randn(2, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(trained(flat), trained(plain), strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    results = []
    for way in (None, reentrant):
        model, _ = flat_model()
        model.base_model.model.checkpointing = way
        x = torch.randn(2, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
        model(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in trained(model))])
    # without gradients, as in the first pass of the reentrant kind, torch takes another kernel, with plain peft too
    assert_close(*results, 1e-12 if reentrant else 0.0)


def test_noise_costs_no_memory_beyond_what_peft_keeps():
    model, _ = flat_model(dtype=torch.float32)
    x = torch.randn(2, 5, DIM, requires_grad=True)
    with unperturbed(model):
        plain, _keep = saved_bytes(lambda: model(x), set())
    flat, _keep2 = saved_bytes(lambda: model(x), set())
    assert flat <= plain
    peaks = []
    for enabled in (False, True):
        perturbation(model).enabled = enabled
        peaks.append(allocations(lambda: model(x).sum().backward())[1])
    assert peaks[1] <= peaks[0] + 4 * 4 * DIM * DIM + 2048  # a block, here the larger weight, and rows


def test_evaluation_is_clean_and_merging_unloads_to_stock_attention():
    model, attention = flat_model()
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    expected = dense(attention, x, *merged_weights(attention))
    assert_close([model.eval()(x)], [expected])
    with perturbed(model, sample=0), torch.no_grad():
        assert (model(x) - expected).abs().max() > 1e-2
    model.train()
    attention.merge()
    assert_close([model(x)], [expected])
    attention.unmerge()
    merged = model.merge_and_unload()
    assert type(merged.attention) is nn.MultiheadAttention
    assert type(merged.attention.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    assert_close([merged(x)], [expected])
    assert not merged._forward_hooks and not merged._forward_pre_hooks


def test_attach_detach_copy_and_pickle():
    model = attach(plain_model(), **FLAT)
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    expected = flat_model()[0](x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
    detach(model)
    attention = model.base_model.model.attention
    assert type(attention) is peft.tuners.lora.layer.MultiheadAttention
    assert type(attention.base_layer.out_proj) is peft.tuners.lora.Linear
    assert torch.equal(model(x), plain_model()(x))


def test_the_saved_adapter_is_plain(tmp_path):
    flat_model()[0].save_pretrained(tmp_path)
    keys = peft.utils.load_peft_weights(str(tmp_path)).keys()
    assert keys == peft.get_peft_model_state_dict(plain_model()).keys()


def test_a_second_adapter_is_flat_in_both_places():
    model, attention = flat_model()
    model.add_adapter("second", FlatLoraConfig(**SETTINGS | FLAT))
    assert attention.flat_adapters == attention.base_layer.out_proj.flat_adapters == {"default", "second"}
    model.delete_adapter("second")
    assert attention.flat_adapters == attention.base_layer.out_proj.flat_adapters == {"default"}


def test_a_failed_injection_leaves_the_model_as_it_was():
    block = Block()
    block.odd = Odd(2, 2)
    names = {name: type(module) for name, module in block.named_modules()}
    with pytest.raises(ValueError, match="'odd'.*forward of its own"):
        get_flat_peft_model(block, FlatLoraConfig(target_modules=["attention", "odd"]))
    assert {name: type(module) for name, module in block.named_modules()} == names


def test_lora_sam_and_efmlora_move_the_factors_of_both():
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    model, attention = flat_model(LoraSamConfig, rho=0.1)
    with ascent(model):
        model(x).square().sum().backward()
    first, second = merged_weights(attention)
    moved = []
    for (weight, layer), twice in zip(parts(attention), (1, 2), strict=True):
        A, B = (getattr(layer, f)["default"].weight + layer.offsets[f, "default"] for f in ("lora_A", "lora_B"))
        moved.append(weight + twice * layer.scaling["default"] * B @ A)
    assert_close([model(x)], [dense(attention, x, *moved)])
    model, attention = flat_model(EFMLoraConfig, rho=0.1)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    assert all(layer.offsets["lora_B", "default"].norm() > 0 for _, layer in parts(attention))


def test_bilora_is_an_error_that_names_the_layer():
    with pytest.raises(ValueError, match="'attention'.*must be linear in the input"):
        flat_model(BiLoraConfig)
