"""A run that stops after any step and resumes in another process ends with the same bits."""

import io
import json

import pytest
import torch
from accelerate import Accelerator
from helpers.runs import adapter, assert_same_adapter, batches, flat_model, rows, trainer
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from flatlora import FlatLoraCallback, perturbation

STEPS = 6


@pytest.fixture(params=["forward", "step"])
def resample(request):
    return request.param


@pytest.fixture(params=[1, 2], ids=["every-batch", "accumulation"])
def accumulation(request):
    return request.param


@pytest.fixture(params=[7, None], ids=["seed", "no-seed"])
def process(request, resample):
    """process(n): the model of the n-th process. Its torch seed differs, and so does a noise seed that is not set."""
    return lambda n: flat_model(
        torch_seed=n, seed=request.param, resample=resample, total_steps=STEPS, lora_dropout=0.1
    )


def test_trainer(process, accumulation, tmp_path):
    def train(n, resume=None):
        # two epochs of three steps; with accumulation the last window of an epoch is incomplete
        windows = dict(gradient_accumulation_steps=accumulation, per_device_train_batch_size=2 // accumulation)
        run = trainer(
            process(n),
            tmp_path,
            callbacks=[FlatLoraCallback()],
            data=rows(5),
            num_train_epochs=2,
            save_strategy="no" if resume else "steps",
            save_steps=1,
            **windows,
        )
        run.train(resume_from_checkpoint=resume)
        assert run.state.global_step == STEPS
        return run.model

    expected = adapter(train(1))
    for step in range(1, STEPS):
        assert_same_adapter(train(1 + step, str(tmp_path / f"checkpoint-{step}")), expected)


def parts(model):
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def test_accelerate(process, accumulation, tmp_path):
    data = batches(STEPS * accumulation)

    def train(n, first=0):
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=accumulation, step_scheduler_with_optimizer=False
        )
        model = process(n)
        accelerator.register_for_checkpointing(perturbation(model))
        model, optimizer, scheduler = accelerator.prepare(model, *parts(model))
        if first:
            accelerator.load_state(tmp_path / str(first))
        model.train()
        for i, batch in enumerate(data[first * accumulation :], start=first * accumulation + 1):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
                if not first:
                    accelerator.save_state(tmp_path / str(i // accumulation))
        return model

    expected = adapter(train(1))
    for step in range(1, STEPS):
        assert_same_adapter(train(1 + step, step), expected)


def test_by_hand(process, accumulation):
    data, saved = batches(STEPS * accumulation), {}

    def train(n, first=0):
        model = process(n)
        optimizer, scheduler = parts(model)
        if first:
            state = torch.load(io.BytesIO(saved[first]), weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["rng"])
            perturbation(model).load_state_dict(json.loads(state["noise"]))
        model.train()
        for step in range(first, STEPS):
            for batch in data[step * accumulation : (step + 1) * accumulation]:
                (model(**batch).loss / accumulation).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            file = io.BytesIO()
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict())
            state |= dict(rng=torch.get_rng_state(), noise=json.dumps(perturbation(model).state_dict()))
            torch.save(state, file)
            saved.setdefault(step + 1, file.getvalue())
        return model

    expected = adapter(train(1))
    for step in range(1, STEPS):
        assert_same_adapter(train(1 + step, step), expected)


def test_between_the_backwards_of_one_step():
    """The state says whether the sample has been used, so it can be saved anywhere outside of a backward."""
    first, second = flat_model(), flat_model(torch_seed=3, seed=None)
    for model in (first, second):
        perturbation(model).total_steps = STEPS
    second.load_state_dict(first.state_dict())
    (batch,) = batches(1)
    first.train()(**batch).loss.backward()
    perturbation(second).load_state_dict(perturbation(first).state_dict())
    assert perturbation(second).state_dict() == perturbation(first).state_dict()
    perturbation(first).progress = perturbation(second).progress = 0.5
    assert torch.equal(first(**batch).logits, second.train()(**batch).logits)


def test_the_callback_joins_on_resume(tmp_path):
    """The checkpoint is of a run without it: the ramp and `resample="step"` need no more than the trainer's step."""
    every_step = dict(max_steps=4, save_strategy="steps", save_steps=1)
    first = flat_model(total_steps=4, resample="step")
    trainer(first, tmp_path, **every_step).train()
    second = flat_model(torch_seed=1, resample="step")
    run = trainer(second, tmp_path / "second", callbacks=[FlatLoraCallback()], **every_step)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_adapter(second, adapter(first))


def test_the_trainer_restores_callbacks_itself(tmp_path):
    def train(resume=None):
        model = flat_model(torch_seed=bool(resume), seed=None, lora_dropout=0.1)
        saving = dict(max_steps=4, save_strategy="steps", save_steps=2)
        run = trainer(
            model, tmp_path, callbacks=[FlatLoraCallback()], restore_callback_states_from_checkpoint=True, **saving
        )
        run.train(resume_from_checkpoint=resume)
        return model

    expected = adapter(train())
    assert_same_adapter(train(str(tmp_path / "checkpoint-2")), expected)


def test_total_steps_of_the_config_wins_over_the_checkpoint(tmp_path):
    saving = dict(max_steps=2, save_strategy="steps", save_steps=1)
    trainer(flat_model(total_steps=2), tmp_path, callbacks=[FlatLoraCallback()], **saving).train()
    model = flat_model(total_steps=8)
    run = trainer(model, tmp_path, callbacks=[FlatLoraCallback()], max_steps=2)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert perturbation(model).progress == 2 / 8
