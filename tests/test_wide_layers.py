"""Layers that are wide enough for the kernel of the adapter's products: training is that of torch's products."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatlora import FlatLoraConfig, get_flat_peft_model
from flatlora.ops import low_rank

WIDTH = 544


class Net(nn.Module):
    def __init__(self, is_checkpointed):
        super().__init__()
        self.up, self.down, self.is_checkpointed = nn.Linear(WIDTH, 640), nn.Linear(640, WIDTH), is_checkpointed

    def block(self, x):
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) if self.is_checkpointed else self.block(x)


def trained(dropout, steps=3, is_checkpointed=False):
    """Losses and adapters after some steps, and the state of the generator."""
    torch.manual_seed(0)
    base = Net(is_checkpointed).bfloat16()
    config = FlatLoraConfig(
        r=8, target_modules=["up", "down"], lora_dropout=dropout, rho=0.1, schedule="constant", seed=1
    )
    model = get_flat_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, losses = torch.randn(30, WIDTH).bfloat16(), []
    for _ in range(steps):
        loss = (model(x.requires_grad_()) - x.flip(-1)).float().square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    factors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return losses, factors, torch.get_rng_state()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_is_that_of_torch_products_within_rounding(monkeypatch, dropout):
    losses, factors, state = trained(dropout)
    monkeypatch.setattr(low_rank, "MIN_WIDTH", 10**9)
    expected, others, other_state = trained(dropout)
    assert torch.equal(state, other_state)  # the same masks were drawn
    assert losses == pytest.approx(expected, rel=2 * torch.finfo(torch.bfloat16).eps)
    for name, factor in factors.items():
        assert (factor - others[name]).norm() <= 0.02 * others[name].norm(), name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_recomputed_forward_changes_no_bit(dropout):
    losses, factors, _ = trained(dropout)
    again, others, _ = trained(dropout, is_checkpointed=True)
    assert losses == again
    assert all(torch.equal(factor, others[name]) for name, factor in factors.items())


def test_a_copy_of_the_model_gives_the_same_gradients():
    torch.manual_seed(0)
    config = FlatLoraConfig(r=8, target_modules=["up", "down"], lora_dropout=0.2, rho=0.1, schedule="constant", seed=1)
    model = get_flat_peft_model(Net(False).bfloat16(), config)
    x, gradients = torch.randn(3, WIDTH).bfloat16(), []
    for one in (model, copy.deepcopy(model)):
        torch.manual_seed(5)
        one(x).float().square().mean().backward()
        gradients.append([p.grad for p in one.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


def test_with_rho_zero_training_is_that_of_peft():
    torch.manual_seed(0)
    base, lora = Net(False).bfloat16(), {"r": 8, "target_modules": ["up", "down"], "lora_dropout": 0.2}
    torch.manual_seed(1)
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(**lora))
    torch.manual_seed(1)
    flat = get_flat_peft_model(base, FlatLoraConfig(**lora, rho=0.0, schedule="constant"))
    x, results = torch.randn(3, WIDTH).bfloat16(), []
    for model in (plain, flat):
        torch.manual_seed(5)
        out = model(x)
        out.float().square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(map(torch.equal, *results))
