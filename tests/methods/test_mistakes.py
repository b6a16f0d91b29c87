"""Invalid settings and combinations raise at once an error that names them and says what to do."""

import contextlib

import pytest
import torch
from helpers import tiny, twin, versions
from torch import nn
from transformers import TrainerState

from flatlora import (
    BarConfig,
    BiLoraConfig,
    EFMLoraConfig,
    FlatLoraCallback,
    FlatLoraConfig,
    FMLoraConfig,
    LoraSamConfig,
    RwpConfig,
    ascent,
    get_flat_peft_model,
    perturbed,
)


class Layers(nn.Module):
    """One layer of each kind that some method does not support."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.embedding = nn.Embedding(5, 4)
        self.convolution = nn.Conv2d(4, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)


FACTOR_METHODS = (FMLoraConfig, EFMLoraConfig, LoraSamConfig, BiLoraConfig, BarConfig)
IN_THE_ADAPTER = {RwpConfig: {"space": "adapter"}}
UNDEFINED = [
    *[(kind, "linear", {"use_dora": True}, "not defined for DoRA") for kind in (*FACTOR_METHODS, RwpConfig)],
    *[(kind, "embedding", {}, "not defined for embeddings") for kind in (*FACTOR_METHODS, RwpConfig)],
    *[(kind, "linear", kasa, "not defined for Kasa") for kasa in versions.kasa().values() for kind in FACTOR_METHODS],
    (BiLoraConfig, "convolution", {}, "not defined for convolutions"),
    *[(kind, "grouped", {}, "not defined for a convolution with 2 groups") for kind in (FMLoraConfig, EFMLoraConfig)],
]


@pytest.mark.parametrize("kind, target, settings, reason", UNDEFINED)
def test_undefined_combinations_are_errors_that_name_the_layer(kind, target, settings, reason):
    settings = {"r": 2, "target_modules": [target], **IN_THE_ADAPTER.get(kind, {}), **settings}
    with pytest.raises(ValueError, match=rf"{target}.*{reason}.*Leave it out of target_modules"):
        get_flat_peft_model(Layers(), kind(**settings))
    with pytest.warns(UserWarning, match=rf"{target}.*{reason}.*trained without noise"):
        get_flat_peft_model(Layers(), kind(on_unsupported="warn", **settings))


def test_rwp_needs_the_norm_of_a_whole_weight():
    with pytest.raises(ValueError, match="'embedding'.*needs the norms of all rows of the merged weight"):
        get_flat_peft_model(Layers(), RwpConfig(r=2, target_modules=["embedding"]))


@pytest.mark.parametrize("kind", FACTOR_METHODS)
def test_factors_that_fsdp1_divides_are_refused(kind):
    model = twin.adapted(kind, rho=0.1, schedule="constant")
    for p in twin.trainable(model):
        p._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="needs whole factors.*FSDP1 keeps slices.*Use FSDP2"):
        with ascent(model) if kind in (FMLoraConfig, LoraSamConfig) else contextlib.nullcontext():
            twin.loss(model, 0).backward()
        torch.optim.SGD(twin.trainable(model), lr=0.1).step()


@pytest.mark.parametrize("kind", FACTOR_METHODS)
def test_a_trainer_whose_optimizer_steps_are_not_seen_is_refused(kind):
    model, callback, state = twin.adapted(kind), FlatLoraCallback(), TrainerState(max_steps=3)
    callback.on_train_begin(None, state, None, model=model)
    with pytest.raises(RuntimeError, match="needs to see the optimizer's step.*FSDP1.*Use FSDP2"):
        callback.on_step_end(None, state, None, model=model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_whose_precision_rounds_the_scale_of_bar_away_are_refused(dtype):
    for rho in (0.0, 0.25):
        model = tiny.adapted(BarConfig(rho=rho, schedule="constant", **tiny.LORA)).to(dtype)
        optimizer = torch.optim.SGD(tiny.trainable(model), lr=1e-4)
        tiny.loss(model).backward()
        before = [p.clone() for p in tiny.trainable(model)]
        refused = pytest.raises(RuntimeError, match=f"rounds to 1.*q_proj.* in {dtype}. .*autocast_adapter_dtype=True")
        with refused if rho else contextlib.nullcontext():
            optimizer.step()
        assert rho == 0 or tiny.same(tiny.trainable(model), before)


def test_bar_acts_in_a_step_under_autocast():
    steps = []
    for rho in (0.0, 0.25):
        model = tiny.adapted(BarConfig(rho=rho, schedule="constant", **tiny.LORA), tiny.base_model().bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            tiny.loss(model).backward()
        before = [p.detach().clone() for p in tiny.trainable(model)]
        torch.optim.SGD(tiny.trainable(model), lr=1e-4).step()
        steps.append([p.detach() - old for p, old in zip(tiny.trainable(model), before, strict=True)])
    for plain, bar, old in zip(*steps, before, strict=True):
        torch.testing.assert_close((bar - plain).norm(), 0.25e-4 * old.norm(), rtol=1e-2, atol=0)


def test_two_methods_in_one_model_are_refused():
    model = get_flat_peft_model(tiny.base_model(), EFMLoraConfig(**tiny.LORA))
    with pytest.raises(ValueError, match="method is EFMLora.*got FlatLora"):
        model.add_adapter("other", FlatLoraConfig(**tiny.LORA, schedule="inverse_sqrt"))


def test_ascent_says_what_is_wrong():
    with pytest.raises(TypeError, match="FlatLora has one"), ascent(tiny.flat_model()):
        pass
    model = tiny.adapted(FMLoraConfig(**tiny.LORA))
    with pytest.raises(RuntimeError, match="no backward inside"), ascent(model):
        pass
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=0.1)
    tiny.loss(model).backward()
    with pytest.raises(RuntimeError, match="takes two passes, and this optimizer step had one"):
        optimizer.step()


@pytest.mark.parametrize("kind", FACTOR_METHODS)
def test_a_strength_or_a_sample_is_refused_where_the_perturbation_is_no_noise(kind):
    model = twin.adapted(kind)
    for options in ({"rho": 0.5}, {"rho": 0.0}, {"sample": 0}):
        ((name, value),) = options.items()
        with pytest.raises(TypeError, match=f"{name} is for methods with random noise.*got {name}={value}. Leave"):
            perturbed(model, **options)
    with perturbed(model):
        twin.loss(model, 0)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (RwpConfig, {"space": "weights"}, "space must be 'merged' or 'adapter', got 'weights'"),
        (BiLoraConfig, {"ascent_r": 0}, "ascent_r must be an integer >= 1, got 0"),
        (BarConfig, {"variant": "bar"}, "variant must be 'obar' or 'nbar', got 'bar'"),
        (EFMLoraConfig, {"schedule": "sqrt"}, "schedule must be one of"),
        (LoraSamConfig, {"rho": -0.1}, "rho must be finite and >= 0, got -0.1"),
    ],
)
def test_settings_are_checked_at_once(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_the_base_of_the_configurations_is_no_method():
    from flatlora.config import PerturbedLoraConfig

    with pytest.raises(TypeError, match="is not a method"):
        PerturbedLoraConfig()
