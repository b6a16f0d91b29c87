"""torch.func, forward-mode AD and traces have the noise and the gradients of loss.backward()."""

import warnings
from collections import OrderedDict

import pytest
import torch
from helpers import layer_cases
from helpers.layer_cases import CASES
from helpers.two_layers import KINDS, TwoLayers, adapted, flat, trainable, x_like
from peft import LoraConfig
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from flatlora import (
    BarConfig,
    BiLoraConfig,
    EFMLoraConfig,
    FlatLoraConfig,
    RwpConfig,
    get_flat_peft_model,
    perturbation,
    perturbed,
    unperturbed,
)

DENSE = [case for case in CASES if "dora" not in case.name and "groups" not in case.name and "depth" not in case.name]
OTHERS = [case for case in CASES if case not in DENSE]


def named(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def total(model, x):
    return lambda parameters, x=x: functional_call(model, parameters, (x,)).square().sum()


def by_backward(model, x):
    """(value, gradients by name) of a pass without a transform, with the current noise."""
    with perturbed(model):
        value = total(model, x)(named(model))
    return value, dict(zip(named(model), torch.autograd.grad(value, list(named(model).values())), strict=True))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_value_and_gradients_of_each_layer(case):
    model, _, x = layer_cases.flat_model(case)
    gradients, value = grad_and_value(total(model, x))(named(model))
    close((value, gradients), by_backward(model, x))


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_what_is_not_perturbed_there_is_refused(case):
    model, _, x = layer_cases.flat_model(case)
    with pytest.raises(RuntimeError, match=r"inside a transform of torch.func.*Use loss.backward\(\)"):
        grad(total(model, x))(named(model))


@pytest.mark.parametrize("kind", [BiLoraConfig, KINDS["rwp-adapter"]])
def test_methods_that_have_no_meaning_there_are_refused(kind):
    model = flat(kind)
    with pytest.raises(RuntimeError, match=r"cannot perturb .* inside a transform of torch.func"):
        grad(total(model, x_like()))(named(model))


@pytest.mark.parametrize("kind", [KINDS["flat"], RwpConfig, EFMLoraConfig, BarConfig])
def test_gradients_of_each_sample(kind):
    model, x = flat(kind, dtype=torch.float64, low=torch.float64), x_like(torch.float64).detach()
    each = vmap(grad(total(model, x)), in_dims=(None, 0))(named(model), x)
    for i, one in enumerate(x):
        close({name: gradient[i] for name, gradient in each.items()}, by_backward(model, one)[1])


def test_an_ensemble_has_the_row_norms_of_each_member():
    model, x = flat(KINDS["flat"], dtype=torch.float64, low=torch.float64), x_like(torch.float64).detach()
    members = [{name: k * p.detach() for name, p in named(model).items()} for k in (1, 2)]
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}
    with perturbed(model, sample=3):
        together = vmap(total(model, x))(stacked)
        one_by_one = torch.stack([total(model, x)(member) for member in members])
    close(together, one_by_one)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's own, of linearize
def test_forward_mode_and_its_transpose():
    """<u, J v> = <J^T u, v>, by two ways to J v."""
    model, x = flat(KINDS["flat"], dtype=torch.float64, low=torch.float64), x_like(torch.float64).detach()
    u, v = torch.randn_like(x), torch.randn_like(x)
    with perturbed(model):
        out, pulled = jvp(model, (x,), (v,))
        close(out, model(x))
        close((u * pulled).sum(), (vjp(model, x)[1](u)[0] * v).sum())
        close(linearize(model, x)[1](v), pulled)
        with forward_ad.dual_level():
            close(forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent, pulled)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_has_the_noise_of_its_pass():
    model, x = flat(KINDS["flat"]), x_like().detach()
    with perturbed(model):
        expected = model(x)
    torch.testing.assert_close(make_fx(model)(x)(x), expected)
    with perturbed(model, sample=0):
        torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), expected)


def test_each_pass_has_new_noise_and_a_step_counts():
    model, x = flat(KINDS["flat"]), x_like().detach()
    optimizer, values = torch.optim.SGD(trainable(model), lr=0.0), []
    for _ in range(3):
        gradients, value = grad_and_value(total(model, x))(named(model))
        for name, p in named(model).items():
            p.grad = gradients[name]
        optimizer.step()
        values.append(value.item())
    assert len(set(values)) == 3
    assert (perturbation(model).steps, perturbation(model).sample) == (3, 2)


def test_clean_passes_are_those_of_plain_lora():
    plain, model, x = adapted(LoraConfig), flat(KINDS["flat"], rho=0.0), x_like().detach()
    for first, second in ((plain, model), (plain.eval(), flat(KINDS["flat"]).eval())):
        assert torch.equal(vmap(first)(x), vmap(second)(x))


def test_nothing_of_a_transform_is_left_behind():
    """No tensor of a transform that has ended is kept."""
    models, x = [flat(KINDS["flat"], model=TwoLayers) for _ in range(2)], x_like().detach()
    with perturbed(models[0]):
        jvp(models[0], (x,), (x,))
    results = [by_backward(model, x) for model in models]
    assert torch.equal(results[0][0], results[1][0])


def weight_norm_by_hooks(linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(linear)


REMADE = {
    "weight_norm (hooks)": weight_norm_by_hooks,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "prune": lambda linear: nn.utils.prune.l1_unstructured(linear, "weight", 0.5),
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("remake", REMADE.values(), ids=REMADE.keys())
def test_a_base_weight_that_hooks_or_parametrizations_make(remake):
    torch.manual_seed(0)
    layers = nn.Sequential(OrderedDict(f=remake(nn.Linear(6, 6).double()), tanh=nn.Tanh()))
    config = FlatLoraConfig(target_modules=["f"], rho=0.5, schedule="constant", seed=1, init_lora_weights=False)
    model = get_flat_peft_model(layers, config, autocast_adapter_dtype=False).train()
    x = torch.randn(4, 6, dtype=torch.float64)
    with unperturbed(model):
        clean = total(model, x)(named(model))
    gradients, value = grad_and_value(total(model, x))(named(model))
    close((value, gradients), by_backward(model, x))
    assert not torch.equal(value, clean)
