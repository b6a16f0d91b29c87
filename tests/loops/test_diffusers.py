"""A UNet and a diffusion transformer of diffusers, saved and loaded with diffusers and with peft."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers.runs import RHO, adapter, assert_same_adapter, cosine
from safetensors import safe_open

from flatlora import FlatLoraConfig, get_flat_peft_model, perturbation

pytest.importorskip("diffusers")
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from helpers.diffusion import transformer, transformer_inputs, unet, unet_inputs

STEPS = 3
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1"]}
FLAT = {"rho": RHO, "seed": 7, "total_steps": STEPS}


MODELS = {
    "unet": (unet, unet_inputs, StableDiffusionPipeline),
    "transformer": (transformer, transformer_inputs, StableDiffusion3Pipeline),
}
models = pytest.mark.parametrize("name", MODELS)


def added(name, kind=FlatLoraConfig, **settings):
    """The model with an adapter as diffusers' own training scripts add it."""
    model = MODELS[name][0]()
    model.requires_grad_(False)
    torch.manual_seed(1)
    model.add_adapter(kind(**LORA, **({**FLAT, **settings} if kind is FlatLoraConfig else settings)))
    return model.train()


def loss(model, inputs, seed):
    out = model(**inputs(seed)).sample
    return F.mse_loss(out, torch.randn(out.shape, generator=torch.Generator().manual_seed(100 + seed)))


def train(name, model, steps=STEPS):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(steps):
        loss(model, MODELS[name][1], seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def output(name, model):
    with torch.no_grad():
        return model.eval()(**MODELS[name][1](50)).sample


def assert_same_output(name, model, expected):
    # torch's attention on the CPU: loading the same plain adapter already differs in the last bit
    torch.testing.assert_close(output(name, model), output(name, expected), rtol=1e-5, atol=1e-6)


@models
def test_ramp(name):
    model = added(name)
    state, seen = perturbation(model), []
    model.register_forward_hook(lambda *_: seen.append((state.rho_t, state.sample)))
    train(name, model)
    assert [rho for rho, _ in seen] == pytest.approx([cosine(step, STEPS) for step in range(STEPS)])
    assert [sample for _, sample in seen] == list(range(STEPS))
    assert state.steps == STEPS


@models
def test_training_is_perturbed_and_evaluation_is_not(name):
    plain, flat = added(name, peft.LoraConfig), added(name, schedule="constant")
    assert torch.equal(output(name, flat), output(name, plain))
    inputs = MODELS[name][1]
    assert loss(flat.train(), inputs, 0) != loss(plain.train(), inputs, 0)
    assert_same_adapter(train(name, added(name, rho=0.0)), adapter(train(name, plain)))


@models
def test_checkpointing_changes_no_bit(name):
    whole, checkpointed = added(name), added(name)
    checkpointed.enable_gradient_checkpointing()
    assert_same_adapter(train(name, checkpointed), adapter(train(name, whole)))


def saved(path):
    """(metadata, shapes by key) of a file of weights."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key).shape for key in file.keys()}  # noqa: SIM118  (a file of safetensors is no dict)


@models
def test_save_lora_adapter(name, tmp_path):
    make, (flat, plain) = (
        MODELS[name][0],
        (train(name, added(name, kind)) for kind in (FlatLoraConfig, peft.LoraConfig)),
    )
    for model, folder in ((flat, "flat"), (plain, "plain")):
        model.save_lora_adapter(tmp_path / folder)
    file = "pytorch_lora_weights.safetensors"
    (metadata, keys), (expected, plain_keys) = saved(tmp_path / "flat" / file), saved(tmp_path / "plain" / file)
    assert keys == plain_keys
    ours, theirs = (json.loads(found["lora_adapter_metadata"]) for found in (metadata, expected))
    assert ours.keys() == theirs.keys()
    again = make()
    again.load_lora_adapter(tmp_path / "flat", prefix=None, weight_name=file)
    assert type(again.peft_config["default_0"]) is peft.LoraConfig
    assert_same_output(name, again, flat)


@models
def test_save_lora_weights(name, tmp_path):
    """Save as the training scripts of diffusers do, and load as a pipeline does."""
    make, _, pipeline = MODELS[name]
    flat, again, kind = train(name, added(name)), make(), pipeline.unet_name if name == "unet" else "transformer"
    state = peft.get_peft_model_state_dict(flat)
    state = convert_state_dict_to_diffusers(state) if name == "unet" else state
    pipeline.save_lora_weights(tmp_path, **{f"{kind}_lora_layers": state}, **_collate_lora_metadata({kind: flat}))
    loaded = pipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    if name == "unet":
        state, alphas, metadata = loaded
        pipeline.load_lora_into_unet(state, alphas, again, metadata=metadata)
    else:
        state, metadata = loaded
        pipeline.load_lora_into_transformer(state, again, metadata=metadata)
    assert {config.lora_alpha for config in again.peft_config.values()} == {LORA["lora_alpha"]}
    assert_same_output(name, again, flat)


@models
def test_peft_saves_it_and_stock_peft_loads_it(name, tmp_path):
    make = MODELS[name][0]
    flat = train(name, get_flat_peft_model(make(), FlatLoraConfig(**LORA, **FLAT)).train())
    flat.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert type(plain.peft_config["default"]) is peft.LoraConfig
    assert_same_output(name, plain, flat)


@models
def test_fused_disabled_and_unloaded(name):
    """What a user does after training."""
    flat = train(name, added(name))
    expected = output(name, flat)
    flat.fuse_lora()
    torch.testing.assert_close(output(name, flat), expected, rtol=1e-4, atol=1e-4)
    flat.unfuse_lora()
    torch.testing.assert_close(output(name, flat), expected, rtol=1e-4, atol=1e-4)
    flat = train(name, added(name))
    flat.disable_adapters()
    assert_same_output(name, flat, MODELS[name][0]())
    flat.unload_lora()
    assert_same_output(name, flat, MODELS[name][0]())
