"""A method from outside the package: its configuration and its mathematics, and nothing else."""

from dataclasses import dataclass, field

import pytest
import torch
from helpers import tiny, twin
from helpers.noise import epsilon, row_norms

import flatlora
from flatlora import FlatLoraConfig, get_flat_peft_model, load, methods, perturbation
from flatlora.config import PerturbedLoraConfig
from flatlora.methods import FactorOffset, WeightNoise
from flatlora.methods.base import MethodState


@dataclass
class SqrtConfig(FlatLoraConfig):
    """Noise relative to the square root of the row norms."""

    def make_method(self):
        return SqrtNoise()


@dataclass(frozen=True)
class SqrtNoise(WeightNoise):
    def row_scale(self, row_norms):
        return row_norms.sqrt()


@dataclass
class ShrinkConfig(PerturbedLoraConfig):
    """The forward sees (1 - rho share) B, and counts the steps."""

    share: float = field(default=0.5, metadata={"help": "Part of rho."})

    def make_method(self):
        return Shrink(self.share)


class Count(MethodState):
    def __init__(self):
        self.steps = 0

    def state_dict(self):
        return {"steps": self.steps}

    def check(self, state, shapes):
        if not isinstance(state, dict) or not isinstance(state.get("steps"), int):
            raise ValueError(f"method must be the steps of Shrink, got {state!r}")
        return state

    def load_state_dict(self, state):
        self.steps = state["steps"]


@dataclass(frozen=True)
class Shrink(FactorOffset):
    uses_gradients = False
    share: float = 0.5

    def make_state(self):
        return Count()

    def offsets(self, layer, run):
        scale = -run.rho_t * self.share
        return {("lora_B", name): scale * layer.lora_B[name].weight.detach() for name in layer.active_flat_adapters()}

    def after_step(self, run, optimizer):
        run.method_state.steps += 1


def merged(W, A, B, share=1.0):
    return W + twin.SCALING * share * B @ A


def test_noise_relative_to_something_else():
    model = twin.adapted(SqrtConfig, rho=0.2, schedule="constant", seed=5)
    loss, tensors, noisy = twin.loss(model, 0), twin.factors(model), []
    for layer, factors in zip(model.base_model.model.layers, tensors, strict=True):
        norms = row_norms(merged(*factors)).flatten().sqrt()
        noisy.append(merged(*factors) + epsilon(merged(*factors), layer.stream, rho=0.2, norms=norms, seed=5))
    assert abs(loss - twin.dense_loss(noisy, 0)) < 1e-7
    assert abs(loss - twin.dense_loss([merged(*factors) for factors in tensors], 0)) > 1e-4


def test_what_runs_two_passes_is_importable_beside_the_methods():
    assert methods.ascent is flatlora.ascent and methods.TwoPassTrainerMixin is flatlora.TwoPassTrainerMixin
    with pytest.raises(AttributeError, match="module 'flatlora.methods' has no attribute 'descent'"):
        methods.descent  # noqa: B018


def test_an_embedding_has_no_norms_of_all_rows():
    with pytest.raises(ValueError, match="SqrtNoise needs the norms of all rows"):
        get_flat_peft_model(tiny.base_model(), SqrtConfig(target_modules=["embed_tokens"]))


def test_an_offset_of_the_factors():
    model = twin.adapted(ShrinkConfig, rho=0.2, schedule="constant", share=0.5)
    shrunk = [merged(*factors, share=0.9) for factors in twin.factors(model)]
    assert abs(twin.loss(model, 0) - twin.dense_loss(shrunk, 0)) < 1e-10


def test_its_state_is_saved_and_checked_and_its_configuration_comes_back(tmp_path):
    model = tiny.adapted(ShrinkConfig(target_modules=["q_proj"], rho=0.1, schedule="constant", share=0.25))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tiny.loss(model).backward()
    optimizer.step()
    saved = perturbation(model).state_dict()
    assert saved["method"] == {"steps": 1}
    with pytest.raises(ValueError, match="method must be the steps of Shrink, got None"):
        perturbation(model).load_state_dict({**saved, "method": None})
    model.save_pretrained(tmp_path)
    again = load(tiny.base_model(), str(tmp_path))
    perturbation(again).load_state_dict(saved)
    assert perturbation(again).method_state.steps == 1
    assert again.peft_config["default"].share == 0.25
