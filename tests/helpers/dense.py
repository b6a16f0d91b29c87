"""The forward of a flat model, with the dense weight W' + eps in each adapted layer.

W' is peft's own merged weight, W + get_delta_weight.
"""

from contextlib import ExitStack
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from flatlora import perturbation
from flatlora.layers.flat_layer import flat_layers
from helpers import tiny
from helpers.noise import epsilon


def cross_entropy(model):
    """`tiny.loss` in the precision of the model. transformers computes it in float32."""
    x = tiny.tokens()
    return F.cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def merged(layer):
    """W', differentiable in A and B."""
    active = [name for name in layer.active_adapters if name in layer.scaling]
    return layer.get_base_layer().weight + sum(layer.get_delta_weight(name) for name in active)


def rows(layer, weight):
    return weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight.flatten(1)


def noise(layer, weight):
    """eps in the layout of the weight."""
    state = layer.perturbation
    rho_t = max(state.rhos[name] for name in layer.active_flat_adapters()) * state.ramp
    flat = rows(layer, weight.detach())
    eps = epsilon(flat, layer.stream, rho=rho_t, seed=state.seed, sample=state.sample)
    return rows(layer, eps).reshape(weight.shape)


def dense_forward(layer, x, noisy=True):
    base, weight = layer.get_base_layer(), merged(layer)
    weight = weight + noise(layer, weight) if noisy else weight
    if isinstance(base, nn.Embedding):
        return F.embedding(x, weight)
    if isinstance(base, nn.Conv2d):
        return F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation)
    bias = sum(layer.scaling[a] * layer.lora_B[a].bias for a in layer.active_adapters if layer.lora_bias.get(a))
    return F.linear(x, rows(layer, weight), base.bias) + bias


def dense_loss(model, loss=cross_entropy):
    """`loss(model)` with dense weights and the noise sample of the previous forward."""
    with ExitStack() as stack:
        for layer in flat_layers(model):
            stack.enter_context(mock.patch.object(layer, "forward", partial(dense_forward, layer)))
        return loss(model)


def assert_dense(model, loss=cross_entropy, tolerance=1e-10):
    """Assert that loss and gradients of a float64 model equal those with dense weights, and that there is noise."""
    parameters = tiny.trainable(model)
    found, expected = (f() for f in (lambda: loss(model), lambda: dense_loss(model, loss)))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    gradients = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    state = perturbation(model)
    state.enabled = False
    assert (loss(model) - found).abs() > 1e-6
    state.enabled = True
