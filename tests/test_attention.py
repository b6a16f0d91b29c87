"""torch's MultiheadAttention, where it differs from the other cases of `test_merged.py`."""

from contextlib import nullcontext

import pytest
import torch
from helpers.merged_cases import (
    ATTENTION,
    DIM,
    FLAT,
    Attention,
    assert_close,
    attend,
    dense_attention,
    flat_model,
    input_of,
    merged_weights,
    parts,
    settings_of,
    trained,
)
from torch import nn

from flatlora import (
    BiLoraConfig,
    EFMLoraConfig,
    FlatLoraConfig,
    LoraSamConfig,
    ascent,
    detach,
    get_flat_peft_model,
    perturbation,
    perturbed,
    unperturbed,
)


class Odd(nn.Linear):
    def forward(self, x):
        return x


def flat_attention(*args, **kwargs):
    model = flat_model(ATTENTION, *args, **kwargs)
    return model, model.base_model.model.block


def frozen(attention):
    return tuple(weight for weight, _ in parts(attention))


def test_the_frozen_weights_are_put_back_bit_for_bit():
    """The weights are also put back if the call fails."""
    model, attention = flat_attention(dtype=torch.bfloat16)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("training, gradients", [(True, True), (True, False), (False, True), (False, False)])
def test_clean_calls_have_the_bits_of_pefts_first_and_move_no_weight(training, gradients, dtype):
    """peft subtracts what it has added, so its W changes with each call."""
    model, attention = flat_attention(dtype=dtype)
    x, bits = input_of(ATTENTION, dtype=dtype), [weight.clone() for weight in frozen(attention)]
    model.train(training)
    with torch.set_grad_enabled(gradients):
        with unperturbed(model) if training and gradients else nullcontext():
            outputs = [model(x) for _ in range(3)]
        assert all(torch.equal(weight, same) for weight, same in zip(frozen(attention), bits, strict=True))
        detach(model)
        first = model(x)  # peft's own
    assert all(torch.equal(out, first) for out in outputs)
    assert not all(torch.equal(weight, same) for weight, same in zip(frozen(attention), bits, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, after a graph break
def test_compiled_calls_are_those_of_eager_mode_and_move_no_weight():
    (model, attention), (eager, _) = flat_attention(dtype=torch.float32), flat_attention(dtype=torch.float32)
    bits, compiled = [weight.clone() for weight in frozen(attention)], torch.compile(model, backend="eager")
    for seed, training in enumerate((False, True, True, False)):
        x = input_of(ATTENTION, seed, dtype=torch.float32)
        outputs = [m.train(training)(x) for m in (compiled, eager)]
        for out in outputs:
            out.square().sum().backward()
        assert_close(outputs[:1], outputs[1:], 1e-6)
        assert all(torch.equal(weight, same) for weight, same in zip(frozen(attention), bits, strict=True))


class WithPenalty(Attention):
    """A model of which some passes compute a penalty on the factors instead of the attention."""

    penalty = False

    def call(self, x):
        if not self.penalty:
            return super().call(x)
        return sum(p.square().sum() for name, p in self.block.named_parameters() if "lora_" in name)


def test_a_penalty_on_factors_whose_attention_has_run_is_no_mistake():
    config = FlatLoraConfig(target_modules=["block"], rho=0.1, schedule="constant")
    model = get_flat_peft_model(WithPenalty(), config).train()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for penalty in (False, True):
        model.base_model.model.penalty = penalty
        model(torch.randn(2, 5, DIM)).square().sum().backward()
    optimizer.step()
    assert perturbation(model).steps == 1
    model(torch.randn(2, 5, DIM)).backward()  # the penalty alone
    with pytest.raises(RuntimeError, match=r"'block' \(FlatMultiheadAttention\) \(and 1 more\) has gradients"):
        optimizer.step()


@pytest.mark.parametrize("kind", [LoraSamConfig, EFMLoraConfig])
def test_methods_on_the_factors_move_no_weight(kind):
    model, attention = flat_attention(kind, dtype=torch.bfloat16)
    bits, optimizer = [weight.clone() for weight in frozen(attention)], torch.optim.SGD(trained(model), lr=0.1)
    for seed in range(3):
        x = input_of(ATTENTION, seed, dtype=torch.bfloat16)
        if kind is LoraSamConfig:
            with ascent(model):
                model(x).square().sum().backward()
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(weight, same) for weight, same in zip(frozen(attention), bits, strict=True))


@pytest.mark.parametrize("noisy", [True, False])
def test_an_error_in_the_middle_of_a_merge_comes_out_and_the_weights_are_back(noisy, monkeypatch):
    model, attention = flat_attention()
    x = input_of(ATTENTION)
    model.train(noisy)
    expected = model(x)
    before = frozen(attention)

    def fail(adapter):
        assert frozen(attention)[0] is not before[0]  # in_proj is already merged
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError, match="no more"):
        patch.setattr(attention.base_layer.out_proj, "get_delta_weight", fail)
        model(x)
    assert all(weight is same for weight, same in zip(frozen(attention), before, strict=True))
    assert torch.equal(model(x), expected)


def test_evaluation_is_clean_and_merging_unloads_to_stock_attention():
    model, attention = flat_attention()
    x = input_of(ATTENTION)
    expected = dense_attention(model, x, noisy=False)
    assert_close([model.eval()(x)], [expected])
    with perturbed(model, sample=0), torch.no_grad():
        assert (model(x) - expected).abs().max() > 1e-2
    model.train()
    attention.merge()
    assert_close([model(x)], [expected])
    attention.unmerge()
    merged = model.merge_and_unload()
    assert type(merged.block) is nn.MultiheadAttention
    assert type(merged.block.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    assert_close([merged(x)], [expected])
    assert not merged._forward_hooks and not merged._forward_pre_hooks


def test_a_second_adapter_is_flat_in_both_places():
    model, attention = flat_attention()
    model.add_adapter("second", FlatLoraConfig(**settings_of(ATTENTION) | FLAT))
    assert attention.flat_adapters == attention.base_layer.out_proj.flat_adapters == {"default", "second"}
    model.delete_adapter("second")
    assert attention.flat_adapters == attention.base_layer.out_proj.flat_adapters == {"default"}


def test_a_failed_injection_leaves_the_model_as_it_was():
    block = Attention()
    block.odd = Odd(2, 2)
    names = {name: type(module) for name, module in block.named_modules()}
    with pytest.raises(ValueError, match="'odd'.*forward of its own"):
        get_flat_peft_model(block, FlatLoraConfig(target_modules=["block", "odd"]))
    assert {name: type(module) for name, module in block.named_modules()} == names


def test_lora_sam_and_efmlora_move_the_factors_of_both():
    x = input_of(ATTENTION)
    model, attention = flat_attention(LoraSamConfig, rho=0.1)
    with ascent(model):
        model(x).square().sum().backward()
    _first, _second = merged_weights(attention)
    moved = []
    for (weight, layer), twice in zip(parts(attention), (1, 2), strict=True):
        A, B = (getattr(layer, f)["default"].weight + layer.offsets[f, "default"] for f in ("lora_A", "lora_B"))
        moved.append(weight + twice * layer.scaling["default"] * B @ A)
    assert_close([model(x)], [attend(attention, x, *moved)])
    model, attention = flat_attention(EFMLoraConfig, rho=0.1)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    assert all(layer.offsets["lora_B", "default"].norm() > 0 for _, layer in parts(attention))


def test_bilora_is_an_error_that_names_the_layer():
    with pytest.raises(ValueError, match="'block'.*must be linear in the input"):
        flat_attention(BiLoraConfig)
