"""Parts of one model that are adapted separately share one perturbation and have different streams (invariant 11)."""

import copy
import gc
import math

import peft
import pytest
import torch
from helpers.noise import unit_noise
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from flatlora import (
    BiLoraConfig,
    EFMLoraConfig,
    FlatLoraCallback,
    FlatLoraConfig,
    attach,
    detach,
    get_flat_peft_model,
    perturbation,
    perturbed,
    unperturbed,
)
from flatlora.layers.flat_layer import flat_layers
from flatlora.training.optimizer_steps import listeners

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Whole(nn.Module):
    """Vision and language, each adapted separately, as InternVL's wrap_backbone_lora and wrap_llm_lora do."""

    def __init__(self, vision=None, language=None, adapt=get_flat_peft_model, config=FlatLoraConfig, **settings):
        super().__init__()
        torch.manual_seed(0)
        settings = {"rho": 0.3, "schedule": "constant", "seed": 3, "init_lora_weights": False} | settings
        for name, own in (("vision", vision), ("language", language)):
            part = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
            setattr(self, name, adapt(part, config(target_modules=["0"], **settings | (own or {}))))

    def forward(self, x, labels=None):
        return {"loss": self.language(self.vision(x)).square().mean()}


def injected(part, config):
    return peft.inject_adapter_in_model(config, part)


def z_of(layer, sample=0):
    return unit_noise(8, 8, layer.stream, seed=layer.perturbation.seed, sample=sample)


def streams(model):
    return [layer.stream for layer in flat_layers(model)]


@pytest.mark.parametrize("adapt", [get_flat_peft_model, injected])
@pytest.mark.parametrize(
    "first", [lambda m: m(X), perturbation, lambda m: unperturbed(m)], ids=["pass", "state", "off"]
)
def test_the_parts_share_one_perturbation_and_no_noise(first, adapt):
    model = Whole(adapt=adapt).train()
    first(model)
    vision, language = flat_layers(model)
    assert vision.perturbation is language.perturbation is perturbation(model) is perturbation(model.language)
    assert not torch.equal(z_of(vision), z_of(language))
    again = Whole(adapt=adapt).train()  # while the first one lives
    first(again)
    assert streams(again) == streams(model) == [0, 1]
    assert torch.equal(again(X)["loss"], model(X)["loss"])


def test_a_part_that_was_joined_hears_of_no_more_steps():
    model = Whole().train()
    parts = [perturbation(part) for part in (model.vision, model.language)]
    assert all(part in listeners() for part in parts)
    assert perturbation(model) is parts[0]
    assert parts[0] in listeners() and parts[1] not in listeners()


def test_functions_reach_all_parts():
    model = Whole()
    with torch.no_grad():
        clean = model.eval()(X)["loss"]
        with perturbed(model):
            noisy = model(X)["loss"]
    model.train()
    with unperturbed(model):
        assert torch.equal(model(X)["loss"], clean)
    assert torch.equal(model(X)["loss"], noisy) and not torch.equal(noisy, clean)
    detach(model)
    assert torch.equal(model(X)["loss"], clean) and not list(flat_layers(model))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(type(part.peft_config["default"]) is peft.LoraConfig for part in (model.vision, model.language))


@pytest.mark.parametrize("other", [{}, {"rho": 0.1}], ids=str)
def test_the_callback_reaches_all_parts(other, tmp_path):
    model, seen = Whole(schedule="cosine", language=other), []

    class See(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append([layer.perturbation.rho_t for layer in flat_layers(model)])

    options = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "remove_unused_columns": False}
    args = TrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2, disable_tqdm=True, **options)
    data = [{"x": torch.randn(8), "labels": 0} for _ in range(8)]
    Trainer(model, args, train_dataset=data, callbacks=[FlatLoraCallback(), See()]).train()
    ramp = [0.5 * (1 - math.cos(math.pi * t / 4)) for t in (1, 2, 3, 4)]
    assert seen == [pytest.approx([0.3 * up, other.get("rho", 0.3) * up]) for up in ramp]


def test_one_optimizer_step_counts_once():
    model = Whole(schedule="linear", total_steps=4).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(X)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert perturbation(model).steps == 3 and perturbation(model).sample == 2


@pytest.mark.parametrize("other", [{"rho": 0.1}, {"schedule": "linear", "total_steps": 9}, {"seed": 4}], ids=str)
def test_parts_with_settings_of_their_own(other):
    model = Whole(language=other).train()
    with pytest.raises(ValueError, match=r"the parts of Whole have different settings.* \((rho|sch|seed)"):
        perturbation(model)
    with torch.no_grad():
        clean = model.eval()(X)["loss"]
    model.train()
    with unperturbed(model):
        assert torch.equal(model(X)["loss"], clean)
    vision, language = flat_layers(model)
    assert not torch.equal(z_of(vision), z_of(language))
    assert perturbation(model.language).rho == other.get("rho", 0.3)
    detach(model)
    assert torch.equal(model(X)["loss"], clean)


def test_models_that_have_nothing_to_do_with_each_other_stay_apart():
    one, two = Whole().train(), Whole().train()
    assert torch.equal(one(X)["loss"], two(X)["loss"])
    assert perturbation(one) is not perturbation(two) and streams(one) == streams(two)


def test_a_gradient_method_sees_all_parts():
    def make():
        parts = [
            get_flat_peft_model(
                nn.Sequential(nn.Linear(8, 8)), EFMLoraConfig(target_modules=["0"], rho=0.3, init_lora_weights=False)
            )
            for _ in range(2)
        ]
        return nn.Sequential(*parts).train()

    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(X).square().mean().backward()
        optimizer.step()
    assert len(perturbation(model).tensors()) == 2


def test_attach_on_the_whole():
    plain = Whole(adapt=lambda part, config: peft.get_peft_model(part, peft.LoraConfig(target_modules=["0"])))
    attach(plain, rho=0.2, schedule="constant")
    assert streams(plain) == [0, 1] and perturbation(plain) is perturbation(plain.language)


def test_a_copied_part_has_noise_of_its_own():
    model = Whole().train()
    perturbation(model)
    model.third = copy.deepcopy(model.language)
    assert perturbation(model) is perturbation(model.third) and streams(model) == [0, 1, 2]


def test_a_copy_of_the_whole_knows_the_names_of_its_layers_from_the_start():
    model = Whole().train()
    names = [name for name, _ in perturbation(model).flat_layers()]
    other = copy.deepcopy(model)
    assert [name for name, _ in perturbation(other.language).flat_layers()] == names
    assert names[0].startswith("vision") and names[1].startswith("language")


def test_a_part_that_is_gone_is_forgotten():
    model = Whole().train()
    state = perturbation(model)
    del model.language
    gc.collect()
    assert len(state.registry.alive()) == 1


def test_a_joined_part_that_is_called_alone_begins_a_pass():
    whole = Whole()
    state = perturbation(whole)
    before = state.passes.count
    whole.language(X)
    whole.vision(X)
    assert state.passes.count == before + 2


def test_a_copy_knows_which_weights_are_tied():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    settings = {"rho": 0.3, "schedule": "constant", "seed": 3}
    model = copy.deepcopy(get_flat_peft_model(net, FlatLoraConfig(target_modules=["0"], **settings)))
    model.add_adapter("second", FlatLoraConfig(target_modules=["1"], **settings))
    assert streams(model) == [0, 0]


def test_compiled_code_knows_the_stream_after_the_parts_were_joined():
    whole = Whole()
    first, second = flat_layers(whole)
    before = second.address
    perturbation(whole)
    assert (first.stream, second.stream) == (0, 1)
    assert before.tolist() == [second.number, 0] and second.address.tolist() == [second.number, 1]


def trained(part, steps):
    """The optimizer of a part that has made some steps alone."""
    optimizer = torch.optim.SGD([p for p in part.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        one_step(part, optimizer)
    return optimizer


def one_step(part, optimizer):
    part(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def run_of(part):
    state = perturbation(part)
    return state.steps, state.sample, state.rho_t, state.enabled, streams(part)


def test_an_evaluation_inside_of_a_wrapper_changes_no_run():
    """Two models are compared during the training of one; then the other one is trained."""
    found = []
    for compared in (False, True):
        model = Whole(schedule="linear", total_steps=10).train()
        optimizer = trained(model.language, 3)
        if compared:
            with torch.no_grad():
                model(X)
        one_step(model.language, optimizer)
        trained(model.vision, 2)
        found.append([run_of(model.language), run_of(model.vision)])
    assert found[0] == found[1] and [run[:2] for run in found[0]] == [(4, 3), (2, 1)]


def test_a_student_begins_its_run_where_its_teacher_has_ended():
    model = Whole(schedule="linear", total_steps=5).train()
    trained(model.vision, 5)
    model.vision.requires_grad_(False).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for i in range(3):
        model(X)["loss"].backward()
        optimizer.step()
        assert run_of(model.language)[:3] == (i + 1, i, pytest.approx(0.3 * (i + 1) / 5))
        assert run_of(model.vision)[0] == 5
    with pytest.raises(ValueError, match="at different points of their runs.*steps: 5 and 3"):
        perturbation(model)


def test_runs_that_come_to_the_same_step_stay_apart():
    model = Whole(schedule="linear", total_steps=9).train()
    trained(model.vision, 2)
    student = perturbation(model.language)
    optimizer = torch.optim.SGD([p for p in model.language.parameters() if p.requires_grad], lr=0.1)
    for i in range(4):
        with unperturbed(model):
            model(X)["loss"].backward()
        optimizer.step()
        assert perturbation(model.language) is student and student.steps == i + 1


def test_a_context_of_a_part_does_not_keep_it_apart():
    model = Whole().train()
    with unperturbed(model.vision):
        model(X)
        assert perturbation(model) is perturbation(model.vision) is perturbation(model.language)


@pytest.mark.parametrize("config", [FlatLoraConfig, BiLoraConfig])
def test_a_trainer_begins_a_run_of_parts_of_which_one_has_trained_alone(config, tmp_path):
    def run(**options):
        model = Whole(config=config, schedule="linear", total_steps=4)
        trained(model.train().vision, 2)
        settings = {"report_to": "none", "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True}
        settings |= {"save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "max_steps": 4}
        data = [{"x": X[i % 4], "labels": 0} for i in range(8)]
        args = TrainingArguments(str(tmp_path), **settings)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[FlatLoraCallback()])
        trainer.train(**options)
        return perturbation(model)

    first = run()
    assert (first.steps, first.rho_t) == (4, pytest.approx(0.3))
    again = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (again.steps, again.sample) == (4, first.sample)


def test_a_part_that_is_switched_off_stays_so():
    model = Whole().train()
    perturbation(model.language).enabled = False
    inside = model.vision(X).detach()
    clean = model.language.eval()(inside)
    model.train()
    for _ in range(2):
        assert torch.equal(model.language(inside), clean)
        model(X)
    assert not perturbation(model.language).enabled and perturbation(model.vision).enabled


def test_the_streams_of_a_run_that_has_begun_stay():
    model = Whole().train()
    trained(model.language, 2)
    model(X)
    assert streams(model.language) == [0]


def test_parts_that_have_drawn_samples_alone_do_not_repeat_them():
    model = Whole().train()
    for _ in range(3):
        model.language(X).sum().backward()
    model(X)
    assert perturbation(model).sample == 3


def test_an_adapter_that_is_deleted_in_one_part_goes_on_in_the_other():
    model, alone = Whole().train(), Whole().train()
    model(X)
    model.language.delete_adapter("default")
    assert perturbation(model).rhos == {"default": 0.3}
    expected, found = (part(X) for part in (alone.vision, model.vision))
    assert torch.equal(found, expected) and not torch.equal(found, model.eval().vision(X))
    found.sum().backward()
    model.vision.delete_adapter("default")
    assert model.vision.base_model.model[0].perturbation.rhos == {}


def unload(part):
    return part.unload()


def merge_and_unload(part):
    return part.merge_and_unload()


@pytest.mark.parametrize("leave", [detach, unload, merge_and_unload])
@pytest.mark.parametrize("first", [True, False], ids=["vision", "language"])
def test_a_part_that_leaves_keeps_no_trace_and_the_other_goes_on(leave, first, tmp_path):
    model, alone = Whole().train(), Whole().train()
    for whole in (model, alone):
        whole(X)
    names = ("vision", "language") if first else ("language", "vision")
    leaving, staying = (getattr(model, name) for name in names)
    leaving.add_adapter("strong", FlatLoraConfig(target_modules=["0"], rho=0.9, schedule="constant", seed=3))
    left = leave(leaving)
    setattr(model, names[0], left)
    for module in (leaving, *left.modules()):
        assert not module._forward_pre_hooks and not module._forward_hooks
    torch.save(left, tmp_path / "left")
    assert b"flatlora" not in (tmp_path / "left").read_bytes()
    assert perturbation(model).rhos == {"default": 0.3}
    passes = perturbation(model).passes.count
    assert torch.equal(staying(X), getattr(alone, names[1])(X))
    model(X)
    assert perturbation(model).passes.count == passes + 2
