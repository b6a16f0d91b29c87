"""Flat layers support every use of autograd that plain LoRA supports."""

import functools

import pytest
import torch
from helpers.two_layers import KINDS, TwoLayers, flat, trainable, x_like
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flatlora import (
    BarConfig,
    BiLoraConfig,
    EFMLoraConfig,
    perturbed,
)

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@every_kind
def test_what_comes_out_can_be_changed_in_place(kind):
    results = []
    for between in (torch.relu, nn.ReLU(inplace=True)):
        model, x = flat(kind, model=functools.partial(TwoLayers, between)), x_like()
        out = model(x).mul_(2)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in trainable(model))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def saves_products(_context, operator, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_selective_checkpointing(kind, dtype):
    contexts = functools.partial(create_selective_checkpoint_contexts, saves_products)
    results = []
    for options in ({}, {"context_fn": contexts}):
        model, x = flat(kind, dtype=dtype), x_like(dtype)
        checkpoint(model, x, use_reentrant=False, **options).float().square().sum().backward()
        results.append([x.grad, *(p.grad for p in trainable(model))])
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # a sum that is not in place is rounded once more
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batched_gradients(dtype):
    model, x = flat(KINDS["flat"], dtype=dtype), x_like(dtype)
    out = model(x)[0, 0]
    eye = torch.eye(6, dtype=dtype)
    one_by_one = torch.stack([torch.autograd.grad(out, x, row, retain_graph=True)[0] for row in eye])
    (batched,) = torch.autograd.grad(out, x, eye, is_grads_batched=True)
    torch.testing.assert_close(batched, one_by_one, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("options", [{}, {"backend": "torch"}, {"use_dora": True}], ids=str)
def test_a_measurement_in_inference_mode_leaves_nothing_behind(options):
    """Inference tensors cannot be saved for backward, nor written outside of inference mode."""
    models = [flat(KINDS["flat"], **options) for _ in range(2)]
    with torch.inference_mode(), perturbed(models[0]):
        measured = models[0](x_like())
    results = []
    for model in models:
        out = model(x_like())
        out.square().sum().backward()
        results.append([out, *(p.grad for p in trainable(model))])
    assert torch.equal(measured, results[0][0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", [EFMLoraConfig, BiLoraConfig, BarConfig])
def test_shapes_on_the_meta_device(kind):
    """The state of the method moves with the model."""
    model = flat(kind).to("meta")
    out = model(torch.empty(4, 6, device="meta"))
    out.sum().backward()
    assert out.is_meta and all(p.grad.is_meta for p in trainable(model))
