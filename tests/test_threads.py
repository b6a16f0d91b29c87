"""Each thread has its own pass; `nn.DataParallel` has several threads in one pass (invariant 10)."""

import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from flatlora import EFMLoraConfig, FlatLoraConfig, get_flat_peft_model, perturbation, perturbed, unperturbed
from flatlora.layers.flat_layer import flat_layers

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def net(**settings):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    settings = {"rho": 0.2, "schedule": "constant", "seed": 3} | settings
    config = FlatLoraConfig(target_modules=["0", "2"], init_lora_weights=False, **settings)
    return get_flat_peft_model(layers, config).train()


def losses(model, steps, run=None):
    optimizer, found = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), []
    for i in range(steps):
        loss = (run or model)((X + i).double()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@contextmanager
def running(work, count=1):
    """Call `work` again and again in other threads. An error in one is raised at the end."""
    stop, errors = threading.Event(), []

    def again_and_again():
        while not stop.is_set():
            try:
                work()
            except Exception as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=again_and_again, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for error in errors:
        raise error


def no_grad(model):
    with torch.no_grad():
        return model(X.double())


def in_unperturbed(model):
    with unperturbed(model):
        return model(X.double())


def in_perturbed(model):
    with torch.no_grad(), perturbed(model, sample=5):
        return model(X.double())


@pytest.mark.parametrize("serve", [no_grad, in_unperturbed, in_perturbed], ids=lambda serve: serve.__name__)
def test_a_thread_that_answers_does_not_touch_the_training(serve):
    model, alone = net(), losses(net(), 60)
    with running(lambda: serve(model)):
        assert losses(model, 60) == alone


def hooked(**settings):
    """A model with hooks: the base layer's forward is replaced during a perturbed forward."""
    model = net(**settings)
    for layer in flat_layers(model):
        layer.base_layer.register_forward_hook(lambda *args: None)
    return model


def factor_method(**settings):
    """A model whose A and B are displaced during a perturbed forward."""
    config = EFMLoraConfig(target_modules=["0", "2"], init_lora_weights=False, rho=2.0, schedule="constant")
    layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    model = get_flat_peft_model(layers, config).train()
    losses(model, 2)
    return model


def convolution(**settings):
    config = FlatLoraConfig(target_modules=["1"], init_lora_weights=False, schedule="constant", **settings)
    layers = nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Conv1d(4, 4, 3), nn.Flatten()).double()
    return get_flat_peft_model(layers, config).train()


@pytest.mark.parametrize("make", [net, hooked, factor_method, convolution], ids=lambda make: make.__name__)
def test_the_answers_are_clean_while_another_thread_trains(make):
    model = make(rho=0.3)
    clean = no_grad(model)
    with running(lambda: model(X.double()).square().mean().backward()):  # no optimizer: the weights stay
        assert all(torch.equal(no_grad(model), clean) for _ in range(200))


def test_models_come_and_go_in_some_threads_while_another_one_steps():
    expected = losses(net(), 60)
    with running(lambda: losses(net(), 1), count=2):
        assert losses(net(), 60) == expected


def replicate(model):
    """Replicate like torch/nn/parallel/replicate.py, with views in place of copies on other devices."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.view_as(parameter))
    return replicas[model]


def data_parallel(model, x):
    out = [None, None]

    def work(i, replica, part):
        out[i] = replica(part)

    parts = enumerate(x.chunk(2))
    threads = [threading.Thread(target=work, args=(i, replicate(model), part)) for i, part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(out)


@pytest.mark.parametrize("settings", [{}, {"resample": "step"}, {"on_unsupported": "warn"}, {"rho": 0.0}], ids=str)
def test_data_parallel_is_the_run_on_one_device(settings):
    alone, model = net(**settings), net(**settings)
    torch.testing.assert_close(
        losses(model, 5, lambda x: data_parallel(model, x)), losses(alone, 5), rtol=1e-12, atol=0
    )
    assert perturbation(model).state_dict() == perturbation(alone).state_dict()


def test_the_contexts_reach_the_replicas():
    model = net()
    with unperturbed(model):
        torch.testing.assert_close(data_parallel(model, X.double()), no_grad(model), rtol=1e-12, atol=1e-13)
    with perturbed(model, sample=5):
        torch.testing.assert_close(data_parallel(model, X.double()), in_perturbed(model), rtol=1e-12, atol=1e-13)
