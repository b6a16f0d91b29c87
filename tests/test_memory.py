"""A layer saves O(m) beyond plain LoRA, and W + eps exists one block at a time (invariant 4)."""

import peft
import pytest
import torch
from helpers import tiny
from helpers.layer_cases import CASES, clean_forward, flat_model
from helpers.memory import allocations, saved_bytes
from peft import LoraConfig

import flatlora.ops.blocks
from flatlora import FlatLoraConfig, get_flat_peft_model


def test_a_layer_saves_order_m_beyond_plain_lora():
    for case in CASES:
        model, layer, x = flat_model(case, dtype=torch.float32)
        x = x.requires_grad_() if x.is_floating_point() else x
        frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        plain, _keep = saved_bytes(lambda: clean_forward(model, x), frozen)  # noqa: B023
        flat, _keep2 = saved_bytes(lambda: model(x), frozen)  # noqa: B023
        base = layer.get_base_layer()
        rows = _keep2.numel() // _keep2.shape[-1] if case.tokens else layer.out_features
        assert flat - plain <= 4 * rows + 64, case.name  # row_std in float32, the key, an empty element
        assert base.weight.numel() > rows


def test_a_model_saves_order_m_for_each_layer():
    plain, flat = tiny.plain_model(), tiny.flat_model()
    frozen = [{p.untyped_storage().data_ptr() for p in model.parameters()} for model in (plain, flat)]
    first, _a = saved_bytes(lambda: tiny.loss(plain), frozen[0])
    second, _b = saved_bytes(lambda: tiny.loss(flat), frozen[1])
    rows = sum(layer.out_features for layer in flat.modules() if hasattr(layer, "perturbation"))
    layers = sum(1 for layer in flat.modules() if hasattr(layer, "perturbation"))
    assert second - first <= 4 * rows + 16 * layers


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_order_m_beyond_plain_lora_in_every_precision(dtype, autocast, dropout, adapters):
    """The input of the second of two layers is not the user's. Autocast casts float32 inputs."""
    m, n = 96, 64

    def saved(kind, **options):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(n, m), torch.nn.Linear(m, m)).to(dtype)
        config = kind(target_modules=["0", "1"], r=4, lora_dropout=dropout, init_lora_weights=False, **options)
        model = peft.get_peft_model(base, config)
        if adapters == 2:
            model.add_adapter("second", config)
            model.base_model.set_adapter(["default", "second"])
        model.train()
        frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        x = torch.randn(512, n).to(torch.float32 if autocast else dtype).requires_grad_()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return saved_bytes(lambda: model(x), frozen)[0]

    options = {"rho": 0.1, "schedule": "constant", "seed": 3}
    assert saved(FlatLoraConfig, **options) - saved(LoraConfig) <= 2 * (4 * m + 64)  # row norms and the key


def test_no_temporary_is_larger_than_a_block(monkeypatch):
    """A weight of 4 MiB, blocks of 64 KiB: forward, norms and backward allocate nothing larger than a block."""
    monkeypatch.setattr(flatlora.ops.blocks, "BLOCK_BYTES", 2**16)
    config = FlatLoraConfig(target_modules=["0"], r=2, schedule="constant")
    model = get_flat_peft_model(torch.nn.Sequential(torch.nn.Linear(256, 4096, bias=False)), config).train()
    x = torch.randn(2, 256, requires_grad=True)
    largest, peak = allocations(lambda: model(x).sum().backward())
    assert model.base_model.model[0].weight.nbytes == 2**22
    assert largest <= 2**16
    assert peak <= 2**19  # outputs and gradients of 32 KiB each, a few rows' worth of vectors, a block


def test_the_peak_of_a_training_step_grows_by_a_block_and_not_with_the_model():
    width, depth = 512, 8

    def peak(config):
        layers = [torch.nn.Linear(width, width) for _ in range(depth)]
        model = peft.get_peft_model(torch.nn.Sequential(*layers), config).train()
        x = torch.randn(16, width)
        model(x).sum().backward()  # gradients exist and caches are filled, as in any step but the first
        return allocations(lambda: model(x).sum().backward())[1]

    options = {"target_modules": [str(i) for i in range(depth)]}
    plain, flat = peak(LoraConfig(**options)), peak(FlatLoraConfig(**options, schedule="constant"))
    block = 4 * width * width  # the whole weight fits into a block
    assert flat - plain <= block + depth * 64 * width  # a few m- and r x m-sized vectors for each layer
    assert depth * block > 3 * (flat - plain)
