"""Strength, schedule and sample: rho_t, progress, and when a new sample is drawn (invariant 6)."""

import math
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.internals import row_norms
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from flatlora import (
    EFMLoraConfig,
    FlatLoraConfig,
    FMLoraConfig,
    attach,
    get_flat_peft_model,
    load,
    perturbation,
    perturbed,
    unperturbed,
)
from flatlora.ops import native, products
from flatlora.training.forward_records import Record

SHAPES = {
    "cosine": lambda t: 0.5 * (1 - math.cos(math.pi * t)),
    "linear": lambda t: t,
    "constant": lambda t: 1.0,
    "cosine_decay": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "linear_decay": lambda t: 1 - t,
}


@pytest.mark.parametrize("schedule", SHAPES)
def test_the_ramp_follows_the_optimizer_steps(schedule):
    model = tiny.flat_model(rho=0.1, schedule=schedule, total_steps=4)
    state = perturbation(model)
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=0.0)
    for step in range(6):  # two steps more than total_steps: the ramp stays at its end
        assert state.progress == min(1.0, step / 4)
        assert state.rho_t == pytest.approx(0.1 * SHAPES[schedule](min(1.0, step / 4)), abs=1e-15)
        optimizer.step()


def test_the_strength_in_the_forward_is_rho_t():
    """The noise of a linear layer is linear in rho_t, so its size can be read off the output."""
    model = get_flat_peft_model(
        torch.nn.Sequential(torch.nn.Linear(8, 8).double()),
        FlatLoraConfig(target_modules=["0"], rho=0.1, schedule="linear", total_steps=10, seed=0),
    )
    x = torch.randn(3, 8, dtype=torch.float64)
    state = perturbation(model)
    clean = model.eval()(x)
    with perturbed(model, sample=0):
        state.progress = 1.0
        full = model(x) - clean
        for progress in (0.0, 0.25, 0.5):
            state.progress = progress
            torch.testing.assert_close(model(x) - clean, progress * full, rtol=0, atol=1e-12)


def test_steps_are_counted_under_accumulation_with_a_last_incomplete_window():
    model = tiny.flat_model(rho=0.1, schedule="linear", total_steps=3)
    state, seen = perturbation(model), []
    optimizer = torch.optim.AdamW(tiny.trainable(model))
    batches = 5
    for batch in range(batches):
        tiny.loss(model, seed=batch).backward()
        seen.append((state.sample, round(state.progress * 3)))
        if batch % 2 == 1 or batch == batches - 1:
            optimizer.step()
            optimizer.zero_grad()
    assert seen == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]
    assert state.progress == 1.0


def test_resample_step_keeps_one_sample_for_an_optimizer_step():
    model = tiny.flat_model(resample="step")
    state, seen = perturbation(model), []
    optimizer = torch.optim.AdamW(tiny.trainable(model))
    for batch in range(6):
        tiny.loss(model).backward()
        seen.append(state.sample)
        if batch % 2 == 1:
            optimizer.step()
    assert seen == [0, 0, 1, 1, 2, 2]


def test_resample_forward_draws_after_a_backward_and_not_before():
    model = tiny.flat_model()
    state = perturbation(model)
    first, again = tiny.loss(model), tiny.loss(model)
    assert torch.equal(first, again) and state.sample == 0
    first.backward()
    with torch.no_grad():
        tiny.loss(model)
    tiny.loss(model.eval())
    assert state.sample == 0  # neither is a training forward
    second = tiny.loss(model.train())
    assert not torch.equal(second, first) and state.sample == 1
    assert torch.equal(tiny.loss(model), second) and state.sample == 1  # no backward has used it


def test_only_the_optimizer_of_the_adapters_counts():
    model, other = tiny.flat_model(total_steps=10), torch.nn.Linear(2, 2)
    state = perturbation(model)
    stranger = torch.optim.SGD(other.parameters(), lr=0.1)
    stranger.step()
    assert state.steps == 0
    parameters = tiny.trainable(model)
    halves = [torch.optim.SGD(part, lr=0.0) for part in (parameters[::2], parameters[1::2])]
    for step in range(3):
        for optimizer in halves:  # two optimizers of one model: a step of the pair is one step
            optimizer.step()
        assert state.steps == step + 1


@pytest.mark.parametrize("kind", [FlatLoraConfig, FMLoraConfig, EFMLoraConfig])
def test_creating_the_state_of_an_optimizer_is_not_a_step(kind):
    model = tiny.adapted(kind(rho=0.1, schedule="constant", **tiny.LORA))
    optimizer = torch.optim.AdamW(tiny.trainable(model))
    get_optimizer_state_dict(model, optimizer)  # makes a step with zero gradients
    assert optimizer.state and perturbation(model).steps == 0 and not perturbation(model).tensors()


class Engine(torch.nn.Module):
    """As a DeepSpeed engine: it makes the optimizer's steps and counts them, also those that it skips."""

    def __init__(self, model):
        super().__init__()
        self.module, self.global_steps, self.skipped_steps = model, 7, 2

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_deepspeed_engine_counts_from_where_the_model_was(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(DeepSpeedEngine=Engine))
    model = tiny.flat_model(schedule="linear", total_steps=10, resample="step")
    state = perturbation(model)
    torch.optim.SGD(tiny.trainable(model), lr=0.0).step()
    engine = Engine(model)
    for made, skipped in ((0, 0), (2, 0), (2, 1)):
        engine.global_steps, engine.skipped_steps = 7 + made, 2 + skipped
        tiny.loss(engine)
        assert state.steps == state.sample == 1 + made - skipped
        assert state.progress == (1 + made - skipped) / 10


def test_an_unknown_length_runs_at_full_strength_and_says_so_once():
    model = tiny.flat_model(schedule="cosine", rho=0.1)
    with pytest.warns(UserWarning, match="total_steps"):
        tiny.loss(model)
    assert perturbation(model).rho_t == 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.loss(model)


def test_progress_and_rho_can_be_set():
    model = tiny.flat_model(schedule="linear", rho=0.1)
    state = perturbation(model)
    state.progress = 0.25
    assert state.progress == 0.25 and state.rho_t == pytest.approx(0.025)
    state.rho = 0.2
    assert state.rho_t == pytest.approx(0.05)
    state.total_steps = 10
    torch.optim.SGD(tiny.trainable(model), lr=0.0).step()
    assert state.progress == pytest.approx(0.35)


def test_enabled_is_what_holds_in_this_thread():
    model = tiny.flat_model()
    state = perturbation(model)
    assert state.enabled
    with unperturbed(model):
        assert not state.enabled
    state.enabled = False
    with perturbed(model):
        assert not state.enabled
    assert not state.enabled


def test_one_state_is_shared_by_the_layers():
    model = tiny.flat_model()
    assert len({id(layer.perturbation) for layer in model.modules() if hasattr(layer, "perturbation")}) == 1


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_bad_rho_is_refused(value):
    for use in (
        lambda: FlatLoraConfig(rho=value),
        lambda: attach(tiny.plain_model(), rho=value),
        lambda: setattr(perturbation(tiny.flat_model()), "rho", value),
    ):
        with pytest.raises(ValueError, match=r"rho must be finite and >= 0, got "):
            use()


@pytest.mark.parametrize("value", ["0.05", None, True])
def test_a_rho_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="rho must be a number, got"):
        FlatLoraConfig(rho=value)


BAD = [
    ({"schedule": "cosin"}, ValueError, "schedule must be one of .*'cosine'.*got 'cosin'"),
    ({"resample": "epoch"}, ValueError, "resample must be one of .*got 'epoch'"),
    ({"backend": "cudnn"}, ValueError, "backend must be one of .*got 'cudnn'"),
    ({"total_steps": 0}, ValueError, r"total_steps must be None or in \[1, .*got 0"),
    ({"total_steps": -3}, ValueError, r"total_steps must be None or in \[1, .*got -3"),
    ({"total_steps": 2.5}, TypeError, "total_steps must be an integer or None, got 2.5"),
    ({"seed": "x"}, TypeError, "seed must be an integer or None, got 'x'"),
    ({"seed": 2**64}, ValueError, "seed must be None or in "),
    ({"on_unsupported": "ignore"}, ValueError, "on_unsupported must be 'error' or 'warn', got 'ignore'"),
]


@pytest.mark.parametrize(
    "options, error, message", BAD, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_bad_settings_are_refused_at_construction_and_by_attach(options, error, message):
    with pytest.raises(error, match=message):
        FlatLoraConfig(**options)
    model = tiny.plain_model()
    with pytest.raises(error, match=message):
        attach(model, **options)
    with pytest.raises(ValueError, match="no flat LoRA layer"):
        perturbation(model)


@pytest.mark.parametrize("value", [-0.1, 1.5, "half", math.nan])
def test_a_bad_progress_is_refused(value):
    with pytest.raises(ValueError, match=r"progress must be a number in \[0, 1\], got"):
        perturbation(tiny.flat_model()).progress = value


@pytest.mark.parametrize("value", [-1, 2**32, 1.0])
def test_a_bad_sample_is_refused(value):
    with pytest.raises(ValueError, match="sample must be None or an integer"):
        perturbed(tiny.flat_model(), sample=value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("total_steps", 0),
        ("total_steps", 2.5),
        ("sample", -1),
        ("sample", None),
        ("seed", "x"),
        ("rank", -1),
        ("rank", 2**32),
    ],
)
def test_what_can_be_set_is_checked(name, value):
    state = perturbation(tiny.flat_model())
    before = getattr(state, name)
    with pytest.raises((TypeError, ValueError), match=rf"{name} must be "):
        setattr(state, name, value)
    assert getattr(state, name) == before


def test_numbers_of_numpy_are_numbers(tmp_path):
    numbers = {"rho": np.float32(0.25), "total_steps": np.int64(8), "seed": np.uint32(3)}
    config = FlatLoraConfig(**numbers)
    config.save_pretrained(tmp_path)
    assert FlatLoraConfig.from_pretrained(tmp_path) == config == FlatLoraConfig(rho=0.25, total_steps=8, seed=3)
    model = tiny.flat_model(**numbers)
    state = perturbation(model)
    state.progress = np.float32(0.5)
    state.set_step(np.int64(2))
    with perturbed(model, sample=np.int64(4)):
        assert torch.equal(tiny.loss(model), tiny.loss(model))
    assert all(type(value) in (int, float) for value in (state.rho, state.total_steps, state.seed, state.progress))


@pytest.mark.parametrize("gathered", [False, True])
def test_whether_norms_are_gathered_depends_on_nothing_that_differs_between_processes(gathered):
    model = tiny.adapted(FlatLoraConfig(rho=0.1, **tiny.LORA))
    layer = next(module for module in model.modules() if hasattr(module, "perturbation"))
    for factor in (layer.lora_A, layer.lora_B):
        if gathered:
            factor["default"].weight.ds_id = 0  # as ZeRO-3 marks what it gathers
    with perturbation(model).records.running(Record(sample=0, perturbed=True, token=object())):
        before = row_norms(layer)
        weight = layer.get_base_layer().weight
        weight.data = weight.data.clone()  # the same weight at another address, as after an all-gather
        assert (row_norms(layer) is before) == gathered


@pytest.mark.skipif(native.LIBRARY is None, reason="the C kernel was not built")
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_row_norms_are_made_once_for_each_pass_and_not_again_in_its_recompute(monkeypatch, options):
    made, perturb = [], products.perturb_weight

    def spy(*args, factors=None, **kwargs):
        made.append(factors is not None)
        return perturb(*args, factors=factors, **kwargs)

    monkeypatch.setattr(products, "perturb_weight", spy)
    model = tiny.flat_model()
    if options is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(options)
    layers = sum(hasattr(module, "perturbation") for module in model.modules())
    for micro in range(3):
        tiny.loss(model, seed=micro).backward()
        assert sum(made) == layers
        made.clear()


def test_arguments_override_what_is_in_the_files_and_unknown_settings_are_named(tmp_path):
    FlatLoraConfig(rho=0.25, r=4).save_pretrained(tmp_path)
    found = FlatLoraConfig.from_pretrained(tmp_path, rho=0.5, lora_dropout=0.1)
    assert (found.rho, found.lora_dropout, found.r) == (0.5, 0.1, 4)
    file = tmp_path / "flatlora_config.json"
    file.write_text(file.read_text().replace('"rho"', '"sigma": 1, "rho"'))
    with pytest.raises(ValueError, match=r"FlatLoraConfig does not know: \['sigma'\]. Install the version"):
        FlatLoraConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at '/no/such/folder'"):
        load(tiny.base_model(), "/no/such/folder")
