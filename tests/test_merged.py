"""Attention and experts: eps is added to the weight that peft merges for each call."""

import copy
import io

import peft
import pytest
import torch
from helpers.memory import allocations, saved_bytes
from helpers.merged_cases import FLAT, assert_close, every_case, flat_model, input_of, plain_model, trained

import flatlora.ops.blocks
from flatlora import attach, detach, perturbation, unperturbed
from flatlora.layers.flat_layer import flat_layers


@every_case
def test_loss_and_gradients_are_those_of_the_dense_expression(case):
    model, x = flat_model(case), input_of(case).requires_grad_()
    streams = [layer.stream for layer in flat_layers(model)]
    assert len(set(streams)) == len(streams) > 1
    out, expected = model(x), case.dense(model, x)
    assert_close([out], [expected])
    leaves, target = [x, *trained(model)], torch.randn_like(out)
    got = torch.autograd.grad(((out - target) ** 2).sum(), leaves)
    assert_close(got, torch.autograd.grad(((expected - target) ** 2).sum(), leaves))
    with unperturbed(model):
        clean = model(x)
    assert_close([clean], [case.dense(model, x, noisy=False)])
    assert (out - clean).abs().max() > 1e-2


@every_case
def test_small_blocks_give_the_same(case, monkeypatch):
    model, x = flat_model(case), input_of(case)
    whole = model(x)
    monkeypatch.setattr(flatlora.ops.blocks, "BLOCK_BYTES", 1)
    monkeypatch.setattr(flatlora.ops.blocks, "ROW_MULTIPLE", 2)
    assert_close([model(x)], [whole], 1e-12)


@every_case
def test_without_strength_it_is_peft_bit_for_bit(case):
    flat, plain = flat_model(case, rho=0.0), plain_model(case)
    for model in (flat, plain):
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            model(input_of(case, seed)).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(trained(flat), trained(plain), strict=True))


@every_case
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(case, reentrant):
    results = []
    for way in (None, reentrant):
        model, x = flat_model(case), input_of(case).requires_grad_()
        model.base_model.model.checkpointing = way
        model(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in trained(model))])
    # without gradients (the first pass of a reentrant checkpoint) attention uses another kernel, also with plain peft
    assert_close(*results, 1e-12 if reentrant and case.name == "attention" else 0.0)


@every_case
def test_noise_costs_a_block_beyond_what_peft_keeps(case):
    model, x = flat_model(case, dtype=torch.float32), input_of(case, dtype=torch.float32).requires_grad_()
    with unperturbed(model):
        plain, _keep = saved_bytes(lambda: model(x), set())
    flat, _keep2 = saved_bytes(lambda: model(x), set())
    assert flat <= plain
    peaks = []
    for enabled in (False, True):
        perturbation(model).enabled = enabled
        peaks.append(allocations(lambda: model(x).sum().backward())[1])
    assert peaks[1] <= peaks[0] + 4 * case.block + 2048  # and rows


@every_case
def test_attach_detach_copy_and_pickle(case):
    model, x = attach(plain_model(case), **FLAT), input_of(case)
    expected = case.dense(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_close([other(x)], [expected])
    detach(model)
    plain = plain_model(case)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(model(x), plain(x))


@every_case
def test_the_saved_adapter_is_plain(case, tmp_path):
    flat_model(case).save_pretrained(tmp_path)
    plain = plain_model(case)
    keys = peft.utils.load_peft_weights(str(tmp_path)).keys()
    assert keys == peft.get_peft_model_state_dict(plain).keys()
    loaded = peft.PeftModel.from_pretrained(case.holder().double(), tmp_path)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in plain.modules()]
