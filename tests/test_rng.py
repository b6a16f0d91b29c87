"""Noise reads and writes no global random generator, and rho = 0 is plain LoRA bit for bit (invariant 3)."""

import random

import numpy as np
import pytest
import torch
from helpers import tiny

from flatlora import perturbation


def train(model, steps=10):
    """Train ten steps with data from the global generator. Returns the losses and the parameters."""
    torch.manual_seed(9)
    optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
    losses = []
    for _ in range(steps):
        x = torch.randint(tiny.TOKENS, (2, 8))
        value = model(input_ids=x, labels=x).loss
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())
    return losses, [p.detach().clone() for p in tiny.trainable(model)]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_with_rho_zero_ten_steps_with_dropout_are_those_of_plain_lora(options):
    plain = train(tiny.plain_model(lora_dropout=0.1, **options))
    flat = train(tiny.flat_model(rho=0.0, lora_dropout=0.1, **options))
    assert tiny.same(plain[0], flat[0]) and tiny.same(plain[1], flat[1])


def test_dropout_masks_and_data_order_do_not_see_the_noise():
    """Noise does not change the draws from torch's generator."""
    train(tiny.plain_model(lora_dropout=0.1))
    after_plain = torch.get_rng_state()
    train(tiny.flat_model(lora_dropout=0.1))
    assert torch.equal(torch.get_rng_state(), after_plain)


def states():
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def test_a_training_step_touches_no_global_generator():
    model = tiny.flat_model()
    optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
    before = states()
    for _ in range(2):
        tiny.loss(model).backward()
        optimizer.step()
    after = states()
    assert torch.equal(before[0], after[0])
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]


def test_the_noise_does_not_depend_on_the_global_generator():
    values = []
    for seed in (1, 2):
        model = tiny.flat_model(seed=7)
        torch.manual_seed(seed)
        values.append(tiny.loss(model))
    assert torch.equal(*values)


def test_the_seed_makes_the_noise_and_set_seed_is_the_default_seed():
    torch.manual_seed(123)
    expected = torch.initial_seed()
    model = tiny.adapted(_config_without_seed())  # `adapted` seeds with 4 before the adapter is made
    assert expected == 123 and perturbation(model).seed == 4
    one, two, three = (tiny.loss(tiny.flat_model(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)


def _config_without_seed():
    from flatlora import FlatLoraConfig

    return FlatLoraConfig(rho=0.2, schedule="constant", **tiny.LORA)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1])
def test_any_64_bit_seed_will_do(seed):
    assert torch.isfinite(tiny.loss(tiny.flat_model(seed=seed)))


def test_ranks_have_different_noise():
    model, values = tiny.flat_model(), []
    for rank in (None, 0, 1, 1):
        perturbation(model).rank = rank
        values.append(tiny.loss(model))
    assert perturbation(model).rank == 1 and torch.equal(values.pop(0), values[0])  # without a process group: 0
    assert torch.equal(values[1], values[2]) and not torch.equal(values[0], values[1])
