"""Models whose loss surface is known in closed form, and a snapshot of a model."""

import random

import numpy
import torch
from torch import nn


class Quadratic(nn.Module):
    """L(w) = (w - w0)^T H (w - w0) / 2 + b^T (w - w0) over all entries w of one linear layer's weight."""

    def __init__(self, m=3, n=4, seed=0, slope=0.0, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.layer = nn.Linear(n, m, bias=False, dtype=dtype)
        self.layer.weight.data = torch.randn(m, n, generator=g, dtype=dtype)
        root = torch.randn(m * n, m * n, generator=g, dtype=dtype)
        self.H = root @ root.T / (m * n)
        self.slope = slope * torch.randn(m * n, generator=g, dtype=dtype)
        self.w0 = self.layer.weight.detach().clone()

    def forward(self, x):  # reads the weight through the layer: layer(I) = W^T
        offset = (self.layer(x).T - self.w0).flatten()
        return offset @ self.H @ offset / 2 + self.slope @ offset

    @property
    def batches(self):
        return [torch.eye(self.layer.in_features, dtype=self.w0.dtype)]


def value(model, batch):
    return model(batch)


class Net(nn.Module):
    """A model with dropout, batch norm, an embedding tied to the head, and a convolution."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.norm(self.convolution(self.embedding(ids).transpose(1, 2))).transpose(1, 2)
        return self.head(torch.tanh(self.drop(self.linear(x))))


def token_loss(model, ids):
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def draws_from_all(model, ids):
    """A loss that draws from every random generator."""
    return token_loss(model, ids) * (1 + torch.rand(()) + random.random() + numpy.random.rand())


class Snapshot:
    """Everything that a measurement must not change."""

    def __init__(self, model):
        self.model = model
        self.state = {k: v.clone() for k, v in model.state_dict().items()}
        self.pointers = [(n, id(p), p.data_ptr(), p._version, p.requires_grad) for n, p in model.named_parameters()]
        self.grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        self.modes = [m.training for m in model.modules()]
        self.own = [sorted(m.__dict__) for m in model.modules()]
        self.rng = torch.get_rng_state(), random.getstate()
        self.arrays = numpy.random.get_state(legacy=False)

    def assert_same(self):
        model = self.model
        assert all(torch.equal(v, self.state[k]) for k, v in model.state_dict().items())
        now = [(n, id(p), p.data_ptr(), p._version, p.requires_grad) for n, p in model.named_parameters()]
        assert now == self.pointers
        for p, grad in zip(model.parameters(), self.grads, strict=True):
            assert (p.grad is None) == (grad is None) and (grad is None or torch.equal(p.grad, grad))
        assert [m.training for m in model.modules()] == self.modes
        assert [sorted(m.__dict__) for m in model.modules()] == self.own
        assert torch.equal(torch.get_rng_state(), self.rng[0]) and random.getstate() == self.rng[1]
        arrays = numpy.random.get_state(legacy=False)
        assert numpy.array_equal(arrays["state"]["key"], self.arrays["state"]["key"])
        assert arrays["state"]["pos"] == self.arrays["state"]["pos"] and arrays["gauss"] == self.arrays["gauss"]
