"""flatlora keeps no model, no tensor and no local of a caller alive; a copy of a part is a part (invariant 13)."""

import copy
import gc
import pickle
import sys
import types
import weakref

import peft
import pytest
import torch
from helpers import tiny
from helpers.internals import entries
from torch import nn

from flatlora import EFMLoraConfig, FlatLoraConfig, attach, detach, get_flat_peft_model, perturbation
from flatlora.ops.registry import LAYERS
from flatlora.training.forward_passes import listener_of

CONFIGS = {
    "plain": peft.LoraConfig(**tiny.LORA),
    "rho=0": FlatLoraConfig(rho=0.0, **tiny.LORA),
    "flat": FlatLoraConfig(rho=0.1, schedule="constant", **tiny.LORA),
    "efmlora": EFMLoraConfig(rho=0.1, **tiny.LORA),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture
def _no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@configs
@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_model_is_freed_with_its_last_reference(config, checkpointing):
    model = tiny.adapted(copy.deepcopy(config))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(tiny.trainable(model))
    for step in range(2):
        tiny.loss(model, seed=step).backward()
        optimizer.step()
    gone = [weakref.ref(p) for p in model.parameters()]
    before = len(LAYERS)
    del model, optimizer
    assert not any(ref() is not None for ref in gone)
    assert len(LAYERS) <= before


@pytest.mark.usefixtures("_no_collector")
def test_what_a_training_function_has_deleted_is_gone_with_deepspeed_imported_too(monkeypatch):
    fake = types.ModuleType("deepspeed")
    fake.DeepSpeedEngine = type("DeepSpeedEngine", (nn.Module,), {})
    monkeypatch.setitem(sys.modules, "deepspeed", sys.modules.get("deepspeed", fake))
    model = tiny.flat_model()

    def step():
        activations = torch.zeros(1000)
        ref = weakref.ref(activations)
        loss = tiny.loss(model)
        del activations
        alive = ref() is not None
        loss.backward()
        return alive

    assert not step()


@pytest.mark.usefixtures("_no_collector")
def test_what_the_caller_of_peft_has_deleted_is_gone():
    def make():
        big = torch.zeros(1000)
        ref = weakref.ref(big)
        model = tiny.adapted(FlatLoraConfig(rho=0.1, **tiny.LORA))
        del big
        return model, ref() is not None

    assert not make()[1]


def test_a_copy_and_its_original_hear_of_their_own_passes():
    model = tiny.flat_model()
    other = copy.deepcopy(model)
    tiny.loss(model)
    for each, count in ((model, 1), (other, 0)):
        assert listener_of(each.base_model) is perturbation(each) and perturbation(each).passes.training == count
    model.add_adapter("second", FlatLoraConfig(**tiny.LORA, rho=0.1, schedule="constant", seed=7))
    assert perturbation(model).rhos == {"default": 0.2, "second": 0.1} and perturbation(other).rhos == {"default": 0.2}


def test_attach_and_detach_leave_no_entry_for_compiled_code():
    model, before = tiny.plain_model(), len(LAYERS)
    for _ in range(5):
        detach(attach(model, rho=0.1))
    assert len(LAYERS) == before


X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


def blocks(**settings):
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(8)])
    settings = {"rho": 0.3, "total_steps": 4, "seed": 1, "schedule": "linear"} | settings
    config = FlatLoraConfig(target_modules=[f"{i}.0" for i in range(8)], init_lora_weights=False, **settings)
    return get_flat_peft_model(layers, config).train(), layers


def train(model, steps=4):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_copies_that_are_gone_do_not_add_up():
    model, layers = blocks()
    registry, seen = perturbation(model).registry, set()
    for _ in range(5):
        copy.deepcopy(layers[7])
        gc.collect()
        seen.add(entries(registry))
    assert len(seen) == 1
    assert len(registry.alive()) == 8


COPIES = {
    "a block": lambda layers: [copy.deepcopy(layers[7])],
    "a layer": lambda layers: [nn.Sequential(copy.deepcopy(layers[7][0]), nn.Tanh())],
    "a list of blocks": lambda layers: list(copy.deepcopy(nn.ModuleList([layers[6], layers[7]]))),
    "a slice": lambda layers: list(copy.deepcopy(layers[6:])),
    "a pickle": lambda layers: [pickle.loads(pickle.dumps(layers[7]))],
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
def test_a_copied_block_is_a_part_of_the_model_that_it_is_put_into(make):
    model, layers = blocks()
    new = make(layers)
    assert len(pickle.dumps(nn.ModuleList(new))) < 0.4 * len(pickle.dumps(model))
    for block in new:
        layers.append(block)
    state = perturbation(model)
    train(model)
    copied = [block[0] for block in layers[8:]]
    assert all(layer.perturbation is state and layer.perturbation.rho_t == 0.3 for layer in copied)
    streams = [block[0].stream for block in layers]
    assert len(set(streams)) == len(streams) and streams[:8] == list(range(8))


WHOLE = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "in a list": lambda model: copy.deepcopy([model])[0],
}


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE.keys())
def test_a_copy_of_the_whole_is_a_model_of_its_own(make):
    model, _ = blocks()
    train(model, 2)
    twin = make(model)
    assert perturbation(twin) is not perturbation(model)
    assert perturbation(twin).state_dict() == perturbation(model).state_dict()
    assert torch.equal(twin(X), model(X))
    train(twin, 1)
    assert (perturbation(twin).steps, perturbation(model).steps) == (3, 2)
    assert perturbation(twin).model is twin.base_model.model
    detach(twin)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in twin.modules())
