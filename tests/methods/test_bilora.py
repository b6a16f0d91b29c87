"""The ascent factors of Bi-LoRA: every adapter's, by the user's optimizer as it is now, of the batches that count."""

import pytest
import torch
from helpers import tiny, twin
from peft import LoraConfig

from flatlora import BiLoraConfig, perturbation

S, UNBOUNDED = twin.SCALING, 1e3  # a rho that is never reached, so that nothing is projected
SETTINGS = {"rho": UNBOUNDED, "schedule": "constant", "ascent_r": 2}


def config(kind=BiLoraConfig, **settings):
    return kind(r=twin.R, lora_alpha=S * twin.R, target_modules=["0", "1", "2"], **settings)


def layers(model):
    return list(model.base_model.model.layers)


def ascent_factors(model, adapter="default"):
    return [tuple(layer.offsets[f"ascent_{x}", adapter].detach().clone() for x in "AB") for layer in layers(model)]


def train(model, optimizer, steps):
    for i in steps:
        twin.loss(model, i).backward()
        optimizer.step()
        optimizer.zero_grad()


def add(model):
    model.add_adapter("new", config(**SETTINGS))
    return "new"


def delete_and_add_again(model):
    model.add_adapter("plain", config(LoraConfig))
    model.set_adapter("plain")
    model.delete_adapter("default")
    model.add_adapter("default", config(**SETTINGS))
    return "default"


def combine(model):
    model.add_weighted_adapter(["default"], [1.0], "new", "cat")
    return "new"


@pytest.mark.parametrize("make", [add, delete_and_add_again, combine])
def test_an_adapter_that_comes_later_ascends(make):
    model = twin.adapted(BiLoraConfig, **SETTINGS)
    train(model, torch.optim.SGD(twin.trainable(model), lr=0.1), range(2))
    adapter = make(model)
    model.set_adapter(adapter)
    before, weights = ascent_factors(model, adapter), []
    for layer in layers(model):
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        weights.append((layer.base_layer.weight + layer.scaling[adapter] * B @ A).detach().requires_grad_())
    G = torch.autograd.grad(twin.dense_loss(weights, 2), weights)
    train(model, torch.optim.SGD(twin.trainable(model), lr=0.1), [2])
    # B_2 = 0 before, so dL/dA_2 = 0 and dL/dB_2 = s G A_2^T
    for layer, (old, _), g in zip(layers(model), before, G, strict=True):
        A2, B2 = layer.offsets["ascent_A", adapter], layer.offsets["ascent_B", adapter]
        assert torch.equal(A2, old) and B2.any()
        torch.testing.assert_close(B2.detach(), 0.1 * layer.scaling[adapter] * g @ old.T, rtol=1e-9, atol=1e-12)


def test_it_ascends_with_the_class_and_the_options_that_the_optimizer_has_now():
    model = twin.adapted(BiLoraConfig, **SETTINGS)
    tensors = twin.factors(model)
    second = [[t.requires_grad_() for t in pair] for pair in ascent_factors(model)]
    flat = [t for pair in second for t in pair]
    kind, options, start = torch.optim.AdamW, {"lr": 1e-2}, 0
    for steps, changes in ((3, {}), (3, {"weight_decay": 0.3, "betas": (0.5, 0.6)}), (3, None), (3, {"momentum": 0.5})):
        if start in (0, 6):
            kind, options = (kind, options) if start == 0 else (torch.optim.SGD, {"lr": 0.3})
            optimizer = kind(twin.trainable(model), **options)
            descend, ascend = kind(twin.leaves(tensors), **options), kind(flat, maximize=True, **options)
        for own in (optimizer, descend, ascend):
            own.param_groups[0].update(changes or {})
        for i in range(start, start + steps):
            train(model, optimizer, [i])
            weights = [W + S * B @ A + S * B2 @ A2 for (W, A, B), (A2, B2) in zip(tensors, second, strict=True)]
            twin.dense_loss(weights, i).backward()
            for own in (descend, ascend):
                own.step()
                own.zero_grad()
        start += steps
    twin.assert_close(model, tensors)
    for found, expected in zip(ascent_factors(model), second, strict=True):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def two_adapters():
    """A model with two adapters, and an optimizer of each."""
    model, optimizers = twin.adapted(BiLoraConfig, **SETTINGS), {}
    model.add_adapter("other", config(**SETTINGS))
    for name in ("default", "other"):
        model.set_adapter(name)
        optimizers[name] = torch.optim.AdamW(twin.trainable(model), lr=1e-2)
    return model, optimizers


def take_turns(model, optimizers, names, start=0):
    for i, name in enumerate(names, start):
        model.set_adapter(name)
        train(model, optimizers[name], [i])


def test_adapters_that_train_in_turn_keep_their_moments():
    model, optimizers = two_adapters()
    take_turns(model, optimizers, ["default", "other"] * 3)
    state = perturbation(model).method_state.optimizer.state
    for layer in layers(model):
        for tensor in layer.offsets.values():
            assert state[tensor]["step"] == 3


def test_a_run_resumes_bit_for_bit_with_another_adapter_than_the_last(tmp_path):
    model, optimizers = two_adapters()
    take_turns(model, optimizers, ["default", "other", "other"])
    saved = {"flat": perturbation(model).state_dict(), "model": model.state_dict()}
    saved |= {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    torch.save(saved, tmp_path / "state")
    take_turns(model, optimizers, ["default", "other"], start=3)

    resumed, optimizers = two_adapters()
    saved = torch.load(tmp_path / "state", weights_only=True)
    resumed.load_state_dict(saved["model"])
    perturbation(resumed).load_state_dict(saved["flat"])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(saved[name])
    take_turns(resumed, optimizers, ["default", "other"], start=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
    for name in ("default", "other"):
        for found, expected in zip(ascent_factors(resumed, name), ascent_factors(model, name), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("checkpoint", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize("factor", [1.0, float("inf")], ids=["finite", "infinite"])
def test_a_discarded_batch_changes_no_bit_of_the_next_step(checkpoint, factor):
    results = []
    for discards in (False, True):
        model = tiny.adapted(BiLoraConfig(**tiny.LORA, **SETTINGS))
        if checkpoint is not None:
            model.gradient_checkpointing_enable(checkpoint)
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
        for i in range(3):
            if discards:
                (factor * tiny.loss(model, 10 + i)).backward()
                optimizer.zero_grad()
            if discards and i == 1:
                optimizer.step()  # without a gradient, it changes nothing
            tiny.loss(model, i).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([*tiny.trainable(model), *perturbation(model).tensors().values()])
    assert tiny.same(*results)


def test_the_batches_of_a_step_add_up_in_the_ascent():
    model = twin.adapted(BiLoraConfig, **SETTINGS)
    before = ascent_factors(model)
    weights = [(W + S * B @ A).detach().requires_grad_() for W, A, B in twin.factors(model)]
    G = torch.autograd.grad(twin.dense_loss(weights, 0) + twin.dense_loss(weights, 1), weights)
    optimizer = torch.optim.SGD(twin.trainable(model), lr=0.1)
    for i in range(2):
        twin.loss(model, i).backward()
    optimizer.step()
    for (_, B2), (A2, _), g in zip(ascent_factors(model), before, G, strict=True):
        torch.testing.assert_close(B2, 0.1 * S * g @ A2.T, rtol=1e-9, atol=1e-12)


def test_names_without_a_place_are_refused():
    model = twin.adapted(BiLoraConfig, **SETTINGS)
    train(model, torch.optim.AdamW(twin.trainable(model), lr=1e-2), [0])
    state = perturbation(model).state_dict()
    names = state["method"]["param_groups"][0]["names"]
    assert set(names) == set(state["tensors"])
    names |= {next(iter(names)): len(names)}
    with pytest.raises(ValueError, match=r"method must be None or the state_dict\(\) of an optimizer"):
        perturbation(model).load_state_dict(state)
