"""FMLoRA and EFMLoRA against algorithms 1 and 2 of arXiv 2508.00522, followed step by step on tensors."""

import contextlib
import math

import pytest
import torch
from helpers import twin
from transformers import Trainer, TrainingArguments

from flatlora import (
    EFMLoraConfig,
    FlatLoraCallback,
    FMLoraConfig,
    TwoPassTrainerMixin,
    ascent,
    perturbation,
    unperturbed,
)

RHO, BETA = 0.1, 0.7


def rho_at(step):
    return RHO / math.sqrt(step + 1)


def weights(tensors, offsets):
    return [W + twin.SCALING * (B + E) @ A for (W, A, B), E in zip(tensors, offsets, strict=True)]


def zeros(tensors):
    return [torch.zeros_like(B) for _, _, B in tensors]


def perturbations(tensors, gradients, offsets, rho):
    pairs = zip(gradients[::2], gradients[1::2], strict=True)
    return [
        twin.dense_ascent(A.detach(), B.detach() + E, grad_A, grad_B, rho)
        for (_, A, B), E, (grad_A, grad_B) in zip(tensors, offsets, pairs, strict=True)
    ]


class Twin:
    """Plain tensors and an optimizer. `optimizer_step(micro)` makes one step over these micro-batches."""

    def __init__(self, model, optimizer=torch.optim.AdamW, clip=None):
        self.tensors, self.clip = twin.factors(model), clip
        self.optimizer = optimizer(twin.leaves(self.tensors), lr=1e-2)
        self.E, self.step = zeros(self.tensors), 0

    def gradients(self, offsets, micro):
        total = sum(twin.dense_loss(weights(self.tensors, offsets), i) for i in micro) / len(micro)
        return torch.autograd.grad(total, twin.leaves(self.tensors))

    def update(self, gradients):
        for p, grad in zip(twin.leaves(self.tensors), gradients, strict=True):
            p.grad = grad
        self.optimizer.step()
        self.step += 1


class EFMTwin(Twin):
    """Algorithm 2: the first step is plain and sets E_1 = E^B_1, whole; beta is of the steps after it."""

    def optimizer_step(self, micro, off=False):
        at = zeros(self.tensors) if off else self.E
        gradients = self.gradients(at, micro)
        if self.clip is not None:
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            gradients = [g * min(1.0, (self.clip / (norm + 1e-6)).item()) for g in gradients]
        new = perturbations(self.tensors, gradients, at, rho_at(self.step))
        beta = 1.0 if self.step == 0 else BETA
        self.update(gradients)
        self.E = [(1 - beta) * old + beta * e for old, e in zip(self.E, new, strict=True)]


class FMTwin(Twin):
    def optimizer_step(self, micro):
        nothing = zeros(self.tensors)
        first = self.gradients(nothing, micro)
        self.update(self.gradients(perturbations(self.tensors, first, nothing, rho_at(self.step)), micro))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_efmlora_equals_algorithm_2_for_50_steps(optimizer, clip, accumulation):
    model = twin.adapted(EFMLoraConfig, rho=RHO, beta=BETA, zero_B=True)
    expected = EFMTwin(model, optimizer, clip)
    own = optimizer(twin.trainable(model), lr=1e-2)
    for step in range(50):
        micro = range(step * accumulation, (step + 1) * accumulation)
        for i in micro:
            (twin.loss(model, i) / accumulation).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(twin.trainable(model), clip)
        own.step()
        own.zero_grad()
        expected.optimizer_step(micro)
    twin.assert_close(model, expected.tensors)
    moved = twin.adapted(EFMLoraConfig, rho=0.0, zero_B=True)
    assert any((p - q).abs().max() > 1e-3 for p, q in zip(twin.trainable(model), twin.trainable(moved), strict=True))
    for layer, E in zip(model.base_model.model.layers, expected.E, strict=True):
        torch.testing.assert_close(layer.offsets["lora_B", "default"], E, rtol=1e-9, atol=1e-12)


def test_a_layer_whose_first_gradient_comes_later_starts_whole_too():
    model = twin.adapted(EFMLoraConfig, rho=RHO, beta=BETA, schedule="constant")
    optimizer = torch.optim.SGD(twin.trainable(model), lr=1e-2)
    late = model.base_model.model.layers[1]
    A, B = late.lora_A["default"].weight, late.lora_B["default"].weight
    twin.loss(model, 0).backward()
    A.grad = B.grad = None
    optimizer.step()
    optimizer.zero_grad()
    assert [len(layer.offsets) for layer in model.base_model.model.layers] == [1, 0, 1]
    twin.loss(model, 1).backward()
    expected = twin.dense_ascent(A.detach(), B.detach(), A.grad, B.grad, RHO)
    optimizer.step()
    torch.testing.assert_close(late.offsets["lora_B", "default"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:this optimizer step trains without noise")  # in evaluation mode
@pytest.mark.parametrize("switch", ["enabled", "unperturbed", "evaluation mode"])
def test_efmlora_takes_the_perturbation_of_a_step_that_is_switched_off_at_B(switch):
    model = twin.adapted(EFMLoraConfig, rho=RHO, beta=BETA)
    expected = EFMTwin(model, torch.optim.SGD)
    optimizer = torch.optim.SGD(twin.trainable(model), lr=1e-2)
    for step in range(6):
        off = step in (2, 4)
        perturbation(model).enabled = not (off and switch == "enabled")
        model.train(not (off and switch == "evaluation mode"))
        with unperturbed(model) if off and switch == "unperturbed" else contextlib.nullcontext():
            twin.loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.optimizer_step([step], off)
    twin.assert_close(model, expected.tensors)
    for layer, E in zip(model.base_model.model.layers, expected.E, strict=True):
        torch.testing.assert_close(layer.offsets["lora_B", "default"], E, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("together", [True, False], ids=["one first pass", "a first pass per micro-batch"])
def test_fmlora_equals_algorithm_1_under_accumulation(together):
    model = twin.adapted(FMLoraConfig, rho=RHO)
    expected = FMTwin(model)
    own = torch.optim.AdamW(twin.trainable(model), lr=1e-2)
    for step in range(20):
        micro = [2 * step, 2 * step + 1] if together else [step]
        with ascent(model):
            for i in micro:
                (twin.loss(model, i) / len(micro)).backward()
        for i in micro:
            (twin.loss(model, i) / len(micro)).backward()
        own.step()
        own.zero_grad()
        expected.optimizer_step(micro)
    twin.assert_close(model, expected.tensors)


def test_fmlora_each_micro_batch_with_a_first_pass_of_its_own():
    model = twin.adapted(FMLoraConfig, rho=RHO)
    expected = FMTwin(model)
    for i in range(2):
        with ascent(model):
            twin.loss(model, i).backward()
        twin.loss(model, i).backward()
    nothing = zeros(expected.tensors)
    wanted = 0
    for i in range(2):
        E = perturbations(expected.tensors, expected.gradients(nothing, [i]), nothing, rho_at(0))
        wanted = [g + w for g, w in zip(expected.gradients(E, [i]), wanted or [0] * 6, strict=True)]
    for p, grad in zip(twin.trainable(model), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)


def test_gradients_are_taken_at_the_moved_point_and_B_is_not_written():
    model = twin.adapted(FMLoraConfig, rho=RHO, schedule="constant")
    before = [p.detach().clone() for p in model.parameters()]
    with ascent(model):
        twin.loss(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())
    twin.loss(model, 0).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for layer in model.base_model.model.layers:
        E, A = layer.offsets["lora_B", "default"], layer.lora_A["default"].weight
        # what is transferred is the projection of E_W onto the rows of A
        assert 0 < torch.linalg.matrix_norm(twin.SCALING * E @ A) <= RHO * (1 + 1e-12)


class Rows(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        x, y = twin.batch(i, size=1)
        return {"x": x[0], "y": y[0]}


class TwinTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return (model(inputs["x"]) - inputs["y"]).square().mean()

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(model, folder, kind=TwinTrainer, **settings):
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "label_names": ["y"]}
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05, **quiet}
    options |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "adam_epsilon": 1e-8, "weight_decay": 1e-2}
    args = TrainingArguments(str(folder), optim="adamw_torch", num_train_epochs=1, **{**options, **settings})
    return kind(model, args, train_dataset=Rows(100), callbacks=[FlatLoraCallback()])


def test_efmlora_in_trainer_equals_algorithm_2(tmp_path, monkeypatch):
    monkeypatch.setattr(twin, "batch", lambda step, size=1, batch=twin.batch: batch(step, 1))
    model = twin.adapted(EFMLoraConfig, rho=RHO, beta=BETA)
    expected = EFMTwin(model, clip=0.05)
    trainer(model, tmp_path).train()
    for step in range(50):
        expected.optimizer_step([2 * step, 2 * step + 1])
    twin.assert_close(model, expected.tensors)


def test_fmlora_in_trainer_with_the_mixin(tmp_path, monkeypatch):
    class TwoPassTrainer(TwoPassTrainerMixin, TwinTrainer):
        pass

    monkeypatch.setattr(twin, "batch", lambda step, size=1, batch=twin.batch: batch(step, 1))
    model = twin.adapted(FMLoraConfig, rho=RHO)
    expected = FMTwin(model)
    settings = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    trainer(model, tmp_path, TwoPassTrainer, **settings).train()
    for step in range(100):
        expected.optimizer_step([step])
    twin.assert_close(model, expected.tensors)
    with pytest.raises(RuntimeError, match="takes two passes"):
        trainer(twin.adapted(FMLoraConfig, rho=RHO), tmp_path, **settings).train()


def test_the_mixin_under_accumulation_gives_each_micro_batch_its_first_pass(tmp_path, monkeypatch):
    class TwoPassTrainer(TwoPassTrainerMixin, TwinTrainer):
        pass

    monkeypatch.setattr(twin, "batch", lambda step, size=1, batch=twin.batch: batch(step, 1))
    model, other = twin.adapted(FMLoraConfig, rho=RHO), twin.adapted(FMLoraConfig, rho=RHO)
    trainer(model, tmp_path, TwoPassTrainer, max_grad_norm=0.0, max_steps=10).train()
    optimizer = torch.optim.AdamW(twin.trainable(other), lr=1e-2)
    for step in range(10):
        for i in (2 * step, 2 * step + 1):
            with ascent(other):
                twin.loss(other, i).backward()
            (twin.loss(other, i) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "config, message", [({"beta": 0.0}, r"beta must be in \(0, 1\], got 0"), ({"rtol": -1.0}, r"rtol must be .*got -1")]
)
def test_settings_are_checked_at_once(config, message):
    with pytest.raises(ValueError, match=message):
        EFMLoraConfig(**config)
