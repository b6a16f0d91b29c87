"""Every method in a Trainer that stops and resumes, and with a GradScaler that overflows."""

import pytest
import torch
from helpers import tiny, twin
from helpers.methods import every_method
from helpers.runs import adapter, assert_same_adapter, rows, trainer
from transformers import Trainer

from flatlora import BiLoraConfig, EFMLoraConfig, FlatLoraCallback, TwoPassTrainerMixin, ascent, perturbation


class TwoPassTrainer(TwoPassTrainerMixin, Trainer):
    pass


def run(kind, settings, folder, resume=None, **more):
    """A run of six optimizer steps of two micro-batches."""
    model = tiny.adapted(kind(rho=0.3, **tiny.LORA, **settings, lora_dropout=0.1))
    loop = TwoPassTrainer if perturbation(model).settings.method.passes == 2 else Trainer
    windows = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "num_train_epochs": 3}
    made = trainer(model, folder, kind=loop, callbacks=[FlatLoraCallback()], data=rows(4), **windows, **more)
    made.train(resume_from_checkpoint=resume)
    return model


def assert_resumes(kind, settings, folder, **more):
    whole = run(kind, settings, folder, save_strategy="steps", save_steps=1, **more)
    kept = perturbation(whole).tensors()
    for step in (1, 4):
        resumed = run(kind, settings, folder / "again", str(folder / f"checkpoint-{step}"), **more)
        assert_same_adapter(resumed, adapter(whole))
        tensors = perturbation(resumed).tensors()
        assert tensors.keys() == kept.keys() and all(torch.equal(t, kept[name]) for name, t in tensors.items())


@every_method
def test_a_trainer_resumes_bit_for_bit(kind, settings, tmp_path):
    assert_resumes(kind, settings, tmp_path)


@pytest.mark.parametrize("kind", [EFMLoraConfig, BiLoraConfig])
def test_a_trainer_resumes_bit_for_bit_with_an_optimizer_that_keeps_no_state(kind, tmp_path):
    assert_resumes(kind, {}, tmp_path, optim="sgd")


@pytest.mark.parametrize("kind", [EFMLoraConfig, BiLoraConfig])
def test_a_state_that_no_checkpoint_holds_is_warned_of_once(kind, tmp_path):
    class Forgetful(torch.optim.lr_scheduler.LambdaLR):
        def state_dict(self):
            return {"last_epoch": self.last_epoch}

    model = tiny.adapted(kind(**tiny.LORA))
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=1e-2)
    optimizers = optimizer, Forgetful(optimizer, lambda step: 1.0)
    with pytest.warns(UserWarning, match="cannot hold it, and Forgetful") as caught:
        trainer(model, tmp_path, callbacks=[FlatLoraCallback()], max_steps=3, more={"optimizers": optimizers}).train()
    assert sum("Forgetful" in str(warning.message) for warning in caught) == 1


def scaled_step(model, optimizer, scaler, step, factor=1.0):
    def backward():
        scaler.scale(twin.loss(model, step) * factor).backward()

    if perturbation(model).settings.method.passes == 2:
        with ascent(model):
            backward()
    backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@every_method
def test_the_scale_of_a_grad_scaler_cancels(kind, settings):
    models = [twin.adapted(kind, rho=0.1, total_steps=6, **settings) for _ in range(2)]
    for model, enabled in zip(models, (False, True), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        optimizer = torch.optim.AdamW(twin.trainable(model), lr=1e-2, eps=1e-30)
        for step in range(5):
            scaled_step(model, optimizer, scaler, step)
    for p, q in zip(*(twin.trainable(model) for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@every_method
def test_an_overflow_is_no_step(kind, settings):
    """An overflow changes neither the adapter nor the state of the method."""
    model = twin.adapted(kind, rho=0.1, total_steps=6, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.AdamW(twin.trainable(model), lr=1e-2)
    for step in range(3):
        scaled_step(model, optimizer, scaler, step)
    state = perturbation(model)
    before, kept = [p.clone() for p in twin.trainable(model)], {name: t.clone() for name, t in state.tensors().items()}
    scaled_step(model, optimizer, scaler, 3, factor=float("inf"))
    assert tiny.same(twin.trainable(model), before)
    assert state.steps == 3 and all(torch.equal(t, state.tensors()[name]) for name, t in kept.items())
    scaled_step(model, optimizer, scaler, 3)
    assert state.steps == 4 and all(p.isfinite().all() for p in [*twin.trainable(model), *state.tensors().values()])
