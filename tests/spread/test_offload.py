"""accelerate's `dispatch_model`: frozen weights are on no device until their layer runs."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers import tiny
from peft.tuners.lora import LoraLayer

from flatlora import FlatLoraConfig, get_flat_peft_model, perturbation

DEVICES = {"embed_tokens": "cpu", "rotary_emb": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu"}
DEVICE_MAP = {f"model.{name}": device for name, device in DEVICES.items()} | {"lm_head": "disk"}
CPU = torch.device("cpu")
OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "device_map": lambda model, folder: dispatch_model(model, DEVICE_MAP, main_device="cpu", offload_dir=folder),
}


@pytest.fixture(params=OFFLOADS)
def offload(request, tmp_path):
    return lambda model: OFFLOADS[request.param](model, tmp_path)


def adapt(base):
    return get_flat_peft_model(base, FlatLoraConfig(rho=0.5, schedule="constant", seed=7, **tiny.LORA)).train()


def train(model):
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=0.1)
    losses = []
    for step in range(3):
        losses.append(tiny.loss(model, seed=step))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [value.detach() for value in losses + tiny.trainable(model)]


def test_training_is_that_of_the_model_in_memory(offload):
    expected, model = tiny.flat_model(), adapt(offload(tiny.base_model()))
    assert any("base_layer" in name and p.is_meta for name, p in model.named_parameters())
    adapters = {name: p.detach().clone() for name, p in expected.named_parameters() if p.requires_grad}
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        layer.lora_A.to_empty(
            device="cpu"
        )  # peft puts the adapter of an offloaded layer on the device of its weight: meta
        layer.lora_B.to_empty(device="cpu")
    model.load_state_dict(adapters, strict=False)
    perturbation(model).rho = perturbation(expected).rho
    torch.testing.assert_close(
        train(model), train(expected), rtol=1e-5, atol=1e-6
    )  # a layer in memory computes one fused product


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_adapters_may_be_offloaded_too(where, tmp_path):
    model = tiny.flat_model()
    expected = tiny.loss(model)
    OFFLOADS[where](model, tmp_path)
    assert all(p.is_meta for p in model.parameters())
    torch.testing.assert_close(tiny.loss(model), expected, rtol=1e-6, atol=0)


def test_an_adapter_without_memory_is_an_error(offload):
    with pytest.raises(RuntimeError, match="adapter has no memory .*to_empty"):
        tiny.loss(adapt(offload(tiny.base_model())))
