"""A flat model in peft: make, attach, switch, merge, delete, refuse."""

import peft
import pytest
import torch
from helpers import tiny
from helpers.internals import forget_other_models, kept_row_norms, row_norms
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from torch import nn

from flatlora import FlatLoraConfig, attach, detach, get_flat_peft_model, perturbation


def fresh(config, wrap):
    model = tiny.base_model()
    torch.manual_seed(4)
    return wrap(model, config).train()


def config(**kwargs):
    return FlatLoraConfig(**{"rho": 0.2, "schedule": "constant", "seed": 7, **tiny.LORA, **kwargs})


def test_both_ways_to_make_a_model_give_the_same_losses():
    models = [fresh(config(), wrap) for wrap in (get_flat_peft_model, peft.get_peft_model)]
    assert type(models[0]) is type(models[1]) and isinstance(models[0], PeftModel)
    for _ in range(3):
        values = [tiny.loss(model) for model in models]
        assert torch.equal(*values)
        for value in values:
            value.backward()


def test_attach_gives_the_same_losses_as_the_config():
    flat, attached = tiny.flat_model(), attach(tiny.plain_model(), rho=0.2, schedule="constant", seed=7)
    assert torch.equal(tiny.loss(flat), tiny.loss(attached))


def test_a_flat_layer_is_still_what_peft_made():
    layer = tiny.flat_model().base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, lora.Linear) and type(layer).__name__ == "FlatLinear"


def test_detach_leaves_no_trace():
    flat, plain = tiny.flat_model(), tiny.plain_model()
    before = tiny.loss(plain)
    detach(flat)
    assert torch.equal(tiny.loss(flat), before)
    for (name, a), (_, b) in zip(flat.named_modules(), plain.named_modules(), strict=True):
        assert type(a) is type(b), name
        assert a.__dict__.keys() == b.__dict__.keys(), name
        assert len(a._forward_pre_hooks) == len(b._forward_pre_hooks), name
        assert len(a._forward_hooks) == len(b._forward_hooks), name
    assert flat.peft_config == plain.peft_config and type(flat.peft_config["default"]) is LoraConfig
    with pytest.raises(ValueError, match="no flat LoRA layer"):
        detach(flat)


@pytest.mark.parametrize("merge", [True, False])
def test_nothing_outlives_unload(merge):
    flat, plain = tiny.flat_model(), tiny.plain_model()
    results = [model.merge_and_unload() if merge else model.unload() for model in (flat, plain)]
    for (name, a), (_, b) in zip(*(model.named_modules() for model in results), strict=True):
        assert type(a) is type(b), name
        assert not a._forward_pre_hooks and not a._forward_hooks, name
    assert tiny.same(*(list(model.state_dict().values()) for model in results))


def test_the_optimizer_hooks_go_with_the_last_model(monkeypatch):
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    forget_other_models(monkeypatch)
    before = len(hooks)
    models = [tiny.flat_model(), attach(tiny.plain_model(), schedule="constant")]
    assert len(hooks) == before + 1
    detach(models[1])
    assert len(hooks) == before + 1
    models[0].unload()
    assert len(hooks) == before


def test_merging_and_unmerging_renews_the_cached_norms():
    """peft merges through `.data`, which no version counter sees."""
    model = tiny.flat_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    tiny.loss(model)
    model.merge_adapter()
    with torch.no_grad():
        layer.base_layer.weight.data.mul_(2)
    model.unmerge_adapter()
    tiny.loss(model)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged = layer.base_layer.weight + layer.scaling["default"] * B @ A
    torch.testing.assert_close(row_norms(layer), merged.norm(dim=1))


def test_a_step_of_the_optimizer_renews_the_norms():
    model = tiny.flat_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=10.0)
    for _ in range(2):
        tiny.loss(model).backward()
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        merged = layer.base_layer.weight + layer.scaling["default"] * B @ A
        torch.testing.assert_close(kept_row_norms(layer), merged.norm(dim=1))
        optimizer.step()


def test_a_second_adapter_with_another_schedule_is_refused():
    model = fresh(config(), get_flat_peft_model)
    with pytest.raises(ValueError, match="schedule is 'constant' for the flat adapters .* got 'linear'"):
        model.add_adapter("second", config(schedule="linear"))


def test_wrong_configs_and_models_are_refused():
    with pytest.raises(TypeError, match="config must be a FlatLoraConfig, got LoraConfig"):
        get_flat_peft_model(tiny.base_model(), LoraConfig(**tiny.LORA))
    with pytest.raises(ValueError, match="has no LoRA layer"):
        attach(tiny.base_model())
    with pytest.raises(ValueError, match="is flat already"):
        attach(tiny.flat_model())
    with pytest.raises(ValueError, match="no flat LoRA layer"):
        perturbation(tiny.plain_model())
    with pytest.raises(ValueError, match="not found in the base model"):
        get_flat_peft_model(tiny.base_model(), FlatLoraConfig(target_modules=["no_such_layer"]))


class WithAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.attention(*[self.first(x)] * 3)[0]


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


UNSUPPORTED = [
    (WithAttention, "attention.out_proj", "MultiheadAttention"),
    (lambda: nn.ModuleDict({"attention": OwnForward(8, 8), "first": nn.Linear(8, 8)}), "attention", "OwnForward"),
]


@pytest.mark.parametrize("build, name, reason", UNSUPPORTED, ids=["attention-inside", "own-forward"])
def test_a_layer_that_cannot_be_perturbed_is_named_and_the_model_left_as_it_was(build, name, reason):
    model = build()
    before = {key: type(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"the layer '{name}' .* cannot be perturbed: .*{reason}.*on_unsupported"):
        get_flat_peft_model(model, FlatLoraConfig(target_modules=["first", name]))
    assert {key: type(module) for key, module in model.named_modules()} == before
    assert not model._forward_pre_hooks and not model._forward_hooks
    with pytest.warns(UserWarning, match=f"'{name}' .* cannot be perturbed: .*trained without noise"):
        model = get_flat_peft_model(model, FlatLoraConfig(target_modules=["first", name], on_unsupported="warn"))
    assert type(model.base_model.model.get_submodule("first")).__name__ == "FlatLinear"


def test_attach_refuses_a_layer_it_cannot_perturb_and_leaves_the_model_as_it_was():
    model = peft.get_peft_model(WithAttention(), LoraConfig(target_modules=["first", "out_proj"]))
    before = {key: type(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match="'base_model.model.attention.out_proj' .* cannot be perturbed"):
        attach(model, schedule="constant")
    assert {key: type(module) for key, module in model.named_modules()} == before
