"""AdaLoRA: W' = W + s/ranknum B E A, its rank schedule, merging and saving."""

import peft
import pytest
import torch
from helpers import tiny
from helpers.dense import assert_dense, dense_forward
from helpers.layer_cases import Holder
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora.layer import SVDLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from flatlora import attach, detach, perturbation
from flatlora.layers.flat_layer import flat_layers

TOTAL = 12
ADALORA = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": TOTAL, "deltaT": 2, "lora_alpha": 8}
LAYERS = {
    "linear": (lambda: nn.Linear(10, 7), (2, 3, 10), {}),
    "conv1d-gpt2": (lambda: Conv1D(7, 10), (3, 10), {"fan_in_fan_out": True}),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), (2, 4, 7, 6), {}),
}


def randomize(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.train()


def adapted(flat=True, rho=0.2, **settings):
    torch.manual_seed(4)
    config = AdaLoraConfig(**ADALORA, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings)
    model = randomize(peft.get_peft_model(tiny.base_model(), config)).double()
    return attach(model, rho=rho, schedule="constant", seed=7) if flat else model


def train(model, steps, each=lambda model: None):
    optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
    for step in range(steps):
        each(model)
        tiny.loss(model, seed=step).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def ranks(model):
    return [int((layer.lora_E["default"] != 0).sum()) for layer in flat_layers(model)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("build, shape, settings", LAYERS.values(), ids=LAYERS)
def test_a_layer_is_the_dense_expression(build, shape, settings, dropout):
    config = AdaLoraConfig(**ADALORA, target_modules=["layer"], lora_dropout=dropout, **settings)
    model = peft.get_peft_model(Holder(build()), config, autocast_adapter_dtype=False)
    model = attach(randomize(model).double(), rho=0.3, schedule="constant", seed=7)
    layer, x = model.base_model.model.layer, torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = [x, *tiny.trainable(model)]
    if dropout:  # what peft computes, and x eps^T
        torch.manual_seed(5)
        out = model(x)
        perturbation(model).enabled = False
        torch.manual_seed(5)
        clean = model(x)
        expected = clean + dense_forward(layer, x) - dense_forward(layer, x, noisy=False)
    else:
        out, expected = model(x), dense_forward(layer, x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (out, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_training_with_the_rank_schedule_is_the_dense_expression_at_every_step():
    model = train(adapted(), TOTAL, each=assert_dense)
    assert perturbation(model).steps == TOTAL
    assert sum(ranks(model)) == ADALORA["target_r"] * len(ranks(model))  # the budget, in any layer


def test_without_strength_it_is_adalora_bit_for_bit():
    models = [train(adapted(flat, rho=0.0), TOTAL) for flat in (True, False)]
    assert tiny.same(*(list(model.state_dict().values()) for model in models))


# peft's own: it takes AdaLoRA's ranks for a rank pattern
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_what_is_saved_is_loaded_by_peft_and_made_flat_again(tmp_path):
    model = train(adapted(), TOTAL)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.base_model(), tmp_path, is_trainable=True).double()
    assert {type(layer) for layer in again.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)} == {SVDLinear}
    assert_dense(attach(again, rho=0.2, schedule="constant", seed=7).train())


def test_merged_detached_and_unloaded_it_is_peft_again():
    flat, plain = adapted(), adapted(flat=False)
    for model in (flat, plain):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_dense(flat)
    detach(flat)
    assert [type(m) for m in flat.modules()] == [type(m) for m in plain.modules()]
    flat, plain = (model.merge_and_unload() for model in (attach(flat, schedule="constant"), plain))
    assert [type(m) for m in flat.modules()] == [type(m) for m in plain.modules()]
    assert tiny.same(list(flat.state_dict().values()), list(plain.state_dict().values()))
