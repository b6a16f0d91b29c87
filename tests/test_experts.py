"""Parameters that peft adapts by `target_parameters`: matrices, and stacks of one matrix per expert.

`test_merged.py` has what they share with attention.
"""

import pytest
import torch
from helpers.merged_cases import (
    DIM,
    FLAT,
    OUT_IN,
    Moe,
    assert_close,
    both_layouts,
    dense_experts,
    flat_model,
    input_of,
    randomize,
    settings_of,
    trained,
    wrappers,
)
from torch import nn

from flatlora import (
    BiLoraConfig,
    EFMLoraConfig,
    FlatLoraConfig,
    LoraSamConfig,
    ascent,
    get_flat_peft_model,
)


def test_two_adapters_and_the_deletion_of_one():
    model = flat_model(OUT_IN)
    model.add_adapter("second", FlatLoraConfig(**settings_of(OUT_IN) | FLAT))
    model.base_model.set_adapter(["default", "second"])
    randomize(model)
    x = input_of(OUT_IN)
    assert len(wrappers(model)) == 3
    assert_close([model(x)], [dense_experts(model, x, adapters=("default", "second"))])
    model.delete_adapter("second")
    assert all(layer.flat_adapters == {"default"} for layer in wrappers(model).values())
    assert_close([model(x)], [dense_experts(model, x)])


@both_layouts
def test_the_frozen_parameters_are_never_written(case):
    model = flat_model(case, dtype=torch.bfloat16)
    base = model.base_model.model.block.get_base_layer()
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


def test_evaluation_is_clean_and_merging_unloads():
    model, x = flat_model(OUT_IN), input_of(OUT_IN)
    expected = dense_experts(model, x, noisy=False)
    assert_close([model.eval()(x)], [expected])
    merged = model.train().merge_and_unload()
    assert type(merged.block) is Moe and not merged._forward_hooks and not merged._forward_pre_hooks
    assert_close([merged(x)], [expected])


def test_a_dtype_without_arithmetic_is_an_error_and_the_model_is_left_as_it_was():
    holder = OUT_IN.holder()
    holder.block.up = nn.Parameter(holder.block.up.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="'block.*its weight is stored as torch.float8_e4m3fn"):
        get_flat_peft_model(holder, FlatLoraConfig(**settings_of(OUT_IN)))
    assert type(holder.block) is Moe and not holder._forward_pre_hooks


def test_lora_sam_moves_the_factors():
    model, x = flat_model(OUT_IN, LoraSamConfig, rho=0.1), input_of(OUT_IN)
    with ascent(model):
        model(x).square().sum().backward()
    out = model(x)
    with torch.no_grad():
        for layer in wrappers(model).values():
            for (factor, adapter), offset in layer.offsets.items():
                getattr(layer, factor)[adapter].weight += offset
    assert_close([out], [dense_experts(model, x, noisy=False)])


def test_methods_that_need_one_matrix_are_errors_that_name_the_layer():
    with pytest.raises(ValueError, match="'block.*not defined for factors that 3 experts share"):
        flat_model(OUT_IN, EFMLoraConfig)
    with pytest.raises(ValueError, match="'block.*must be linear in the input"):
        flat_model(OUT_IN, BiLoraConfig)
    flat_model(OUT_IN, EFMLoraConfig, target_parameters=["block.gate"])


def test_factors_that_fsdp1_has_wrapped_are_refused():
    model = flat_model(OUT_IN)
    factor = next(iter(wrappers(model).values())).lora_A["default"]
    factor._fsdp_wrapped_module = nn.Linear(DIM, 2)  # as FSDP1 keeps what it wraps
    with pytest.raises(RuntimeError, match="An expert parameter cannot be trained under FSDP1 .* Use FSDP2 or ZeRO-3"):
        model(input_of(OUT_IN))
