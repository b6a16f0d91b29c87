"""Plain loops: what counts as an optimizer step, and what does not."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.runs import adapter, assert_same_adapter, batches, cosine, flat_model, plain_model
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from flatlora import perturbation

STEPS = 4


def trained(model, part=""):
    return [p for name, p in model.named_parameters() if p.requires_grad and part in name]


def strengths(seen):
    return [p.rho for p in seen]


def ramp(steps):
    """The strength after each number of optimizer steps."""
    return pytest.approx([cosine(step, STEPS) for step in steps], abs=1e-6)


@pytest.fixture
def model():
    return flat_model(total_steps=STEPS).train()


@pytest.fixture
def seen(model, passes):
    return passes(model)


def test_accumulation_with_an_incomplete_last_window(model, seen):
    optimizer, data = AdamW(trained(model)), batches(8)
    for i, batch in enumerate(data, start=1):
        (model(**batch).loss / 3).backward()
        if i % 3 == 0 or i == len(data):
            clip_grad_norm_(trained(model), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert strengths(seen) == ramp([0, 0, 0, 1, 1, 1, 2, 2])
    assert perturbation(model).steps == 3


def test_accelerate_with_an_incomplete_last_window(model, seen):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    optimizer = AdamW(trained(model))
    loader = torch.utils.data.DataLoader(batches(5), batch_size=None)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(2):  # epochs
        for batch in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    assert strengths(seen) == ramp([0, 0, 0, 1, 1, 2, 2, 2, 3, 3])
    assert perturbation(model).rho_t == perturbation(model).rho


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_a_step_that_the_scaler_skips_does_not_count(model, seen, fused):
    # a fused optimizer is also called for a skipped step, and skips it itself
    optimizer, scaler = AdamW(trained(model), fused=fused), torch.amp.GradScaler("cpu")
    for i, batch in enumerate(batches(4)):
        loss = model(**batch).loss * (torch.inf if i == 1 else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert strengths(seen) == ramp([0, 1, 1, 2])


PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
def test_autocast_with_a_scaler_clipping_and_accumulation(model, seen, dtype):
    optimizer, scaler = AdamW(trained(model)), torch.amp.GradScaler("cpu")
    for i, batch in enumerate(batches(8)):
        with torch.autocast("cpu", dtype=dtype):
            loss = model(**batch).loss / 2
        scaler.scale(loss * (torch.inf if i == 2 else 1)).backward()  # spoils the second step
        if i % 2:
            scaler.unscale_(optimizer)
            clip_grad_norm_(trained(model), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert strengths(seen) == ramp([0, 0, 1, 1, 1, 1, 2, 2])
    assert [p.samples for p in seen] == [{i} for i in range(8)]
    assert all(p.isfinite().all() for p in trained(model))


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
def test_autocast_without_strength_is_plain_lora(dtype):
    def train(model):
        optimizer, scaler = AdamW(trained(model.train()), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=64.0)
        for batch in batches(3):
            with torch.autocast("cpu", dtype=dtype):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model

    assert_same_adapter(train(flat_model(rho=0.0)), adapter(train(plain_model())))


@pytest.fixture
def _other_precision():
    """Reset accelerate, which keeps one precision for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_other_precision")
def test_accelerate_in_mixed_precision_with_a_step_that_is_skipped(model, seen):
    # on the CPU accelerate has only bf16, which it does not scale: put in its scaler for fp16 by hand
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    prepared, optimizer = accelerator.prepare(model, AdamW(trained(model)))
    for i, batch in enumerate(batches(8)):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss * (torch.inf if i == 2 else 1))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
            optimizer.step()
            if accelerator.sync_gradients:
                assert optimizer.step_was_skipped == (i == 3)
            optimizer.zero_grad()
    assert strengths(seen) == ramp([0, 0, 1, 1, 1, 1, 2, 2])


def test_saved_tensors_that_are_moved_away_and_back():
    """Activation offloading does this."""
    models = [flat_model(schedule="constant").train() for _ in range(2)]
    for model, moved in zip(models, (False, True), strict=True):
        optimizer = AdamW(trained(model), lr=1e-2)
        for batch in batches(3):
            with torch.autograd.graph.save_on_cpu() if moved else nullcontext():
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_adapter(models[1], adapter(models[0]))


def test_training_in_evaluation_mode_is_warned_of_once(model):
    """`from_pretrained` returns a model in evaluation mode."""
    optimizer, data = AdamW(trained(model)), batches(4)

    def step(batch):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(data[0])
    model.eval()
    with pytest.warns(UserWarning, match="trains without noise.*Call model.train()"):
        step(data[1])
    step(data[2])


def test_evaluation_beside_training_is_not_warned_of(model):
    optimizer, (batch,) = AdamW(trained(model)), batches(1)
    model.eval()(**batch).loss.backward()
    model.train()(**batch).loss.backward()
    optimizer.step()
    assert perturbation(model).steps == 1


def test_two_optimizers_make_one_step(model, seen):
    optimizers = [AdamW(trained(model, "lora_A")), SGD(trained(model, "lora_B"))]
    for batch in batches(3):
        model(**batch).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert strengths(seen) == ramp([0, 1, 2])


def test_a_scheduler_wraps_the_optimizer(model, seen):
    optimizer = AdamW(trained(model))
    scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
    for batch in batches(3):
        model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert strengths(seen) == ramp([0, 1, 2])


class Wrapper(Optimizer):
    """An optimizer whose step calls that of another one, like Lookahead and SAM."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step(closure)


def test_an_optimizer_inside_of_another_makes_one_step(model, seen):
    optimizer = Wrapper(AdamW(trained(model)))
    for batch in batches(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert strengths(seen) == ramp([0, 1, 2])


def test_a_step_that_raises_does_not_count(model, seen):
    def fail():
        raise KeyboardInterrupt

    optimizer = Wrapper(AdamW(trained(model)))
    for i, batch in enumerate(batches(3)):
        model(**batch).loss.backward()
        if i == 1:
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(fail)
        else:
            optimizer.step()
        optimizer.zero_grad()
    assert strengths(seen) == ramp([0, 1, 1])


def test_the_step_of_another_model_does_not_count(model, seen):
    other = flat_model(total_steps=STEPS).train()
    mine, others = AdamW(trained(model)), AdamW(trained(other))
    for i, batch in enumerate(batches(3)):
        (model(**batch).loss + other(**batch).loss).backward()
        others.step()
        if i == 1:
            mine.step()
    assert strengths(seen) == ramp([0, 0, 1])
    assert perturbation(other).steps == 3


def test_parameters_added_to_an_optimizer_that_has_stepped(model, seen):
    head = torch.nn.Parameter(torch.zeros(()))
    optimizer = AdamW([head])
    for i, batch in enumerate(batches(3)):
        (model(**batch).loss + head).backward()
        optimizer.step()
        if i == 0:
            optimizer.add_param_group({"params": trained(model)})
    assert strengths(seen) == ramp([0, 0, 1])


def test_without_strength_it_is_plain_lora():
    def train(model):
        torch.manual_seed(5)
        optimizer = AdamW(trained(model.train()), lr=1e-2)
        scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
        for batch in batches(10):
            model(**batch).loss.backward()
            clip_grad_norm_(trained(model), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return model

    plain = train(plain_model(lora_dropout=0.1))
    assert_same_adapter(train(flat_model(rho=0.0, lora_dropout=0.1)), adapter(plain))
