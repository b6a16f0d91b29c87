"""`optimizer.step(closure)`: forward and backward run inside of the step."""

import gc
import weakref

import pytest
import torch
from helpers import runs
from helpers.runs import RHO, adapter, assert_same_adapter, batches, cosine, flat_model
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flatlora import (
    BarConfig,
    BiLoraConfig,
    EFMLoraConfig,
    FlatLoraConfig,
    FMLoraConfig,
    LoraSamConfig,
    RwpConfig,
    ascent,
    perturbation,
    perturbed,
)

STEPS = 4
FLAT = {"rho": RHO, "seed": 7, "total_steps": STEPS}
METHODS = {
    "flat": (FlatLoraConfig, FLAT),
    "flat-by-step": (FlatLoraConfig, {**FLAT, "resample": "step"}),
    "rwp": (RwpConfig, {**FLAT, "space": "adapter"}),
    "efmlora": (EFMLoraConfig, {"rho": RHO}),
    "bilora": (BiLoraConfig, {"rho": RHO}),
    "bar": (BarConfig, {"rho": RHO, "total_steps": STEPS}),
    "fmlora": (FMLoraConfig, {"rho": RHO}),
    "lora-sam": (LoraSamConfig, {"rho": RHO}),
}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model, data, optimizer):
    """The gradients of all micro-batches of a step, by the method's own passes."""
    optimizer.zero_grad()
    if perturbation(model).settings.method.passes == 2:
        with ascent(model):
            for batch in data:
                model(**batch).loss.backward()
    total = 0.0
    for batch in data:
        loss = model(**batch).loss
        loss.backward()
        total += loss.item()
    return total


def steps(micro_batches=1):
    data = batches(STEPS * micro_batches)
    return [data[i : i + micro_batches] for i in range(0, len(data), micro_batches)]


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize("config, settings", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("by_name", [False, True], ids=["positional", "keyword"])
def test_the_run_is_that_of_the_loop_with_backward_before_the_step(kind, config, settings, by_name):
    found = []
    for closure in (False, True):
        model = runs.plain_model(kind=config, **settings).train()
        optimizer = kind(trained(model), lr=0.05)
        for data in steps(2):
            if not closure:
                gradients(model, data, optimizer)
                optimizer.step()
            else:

                def run(data=data, model=model, optimizer=optimizer):
                    return gradients(model, data, optimizer)

                optimizer.step(closure=run) if by_name else optimizer.step(run)
        assert perturbation(model).steps == STEPS
        found.append(model)
    assert_same_adapter(found[1], adapter(found[0]))


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_lbfgs_sees_one_objective_in_a_step(line_search, micro_batches, passes):
    """All forwards of a step have the noise of the first; the next step has other noise."""
    models = [flat_model(total_steps=STEPS).train() for _ in range(2)]
    seen = passes(models[0])
    for model in models:
        optimizer = LBFGS(trained(model), lr=0.1, max_iter=4, line_search_fn=line_search)
        for step, data in enumerate(steps(micro_batches)):

            def closure(step=step, data=data, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                total = torch.zeros(())
                for i, batch in enumerate(data):
                    if model is models[0]:
                        loss = model(**batch).loss
                    else:
                        with perturbed(model, sample=step * micro_batches + i):
                            loss = model(**batch).loss
                    loss.backward()
                    total += loss.detach()
                return total

            optimizer.step(closure)
    assert_same_adapter(models[0], adapter(models[1]))
    assert len(seen) > STEPS * micro_batches
    assert sorted({round(p.rho, 5) for p in seen}) == [round(cosine(step, STEPS), 5) for step in range(STEPS)]
    assert perturbation(models[0]).steps == STEPS


@pytest.mark.parametrize("config", [EFMLoraConfig, BiLoraConfig, BarConfig])
def test_methods_of_one_gradient_refuse_a_closure_that_runs_again(config):
    model = runs.plain_model(kind=config, rho=RHO, total_steps=STEPS).train()
    optimizer = LBFGS(trained(model), max_iter=4)
    with pytest.raises(RuntimeError, match="LBFGS calls its closure several times in a step.*one gradient per step"):
        optimizer.step(lambda: torch.tensor(gradients(model, batches(1), optimizer)))
    perturbation(model).rho = 0.0  # then there is no perturbation to compute
    optimizer = LBFGS(trained(model), max_iter=4)
    optimizer.step(lambda: torch.tensor(gradients(model, batches(1), optimizer)))


class Forgetful(Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        pass


def test_a_closure_that_is_not_called():
    model = runs.plain_model(kind=EFMLoraConfig, rho=RHO).train()
    with pytest.raises(RuntimeError, match="Forgetful was given a closure and did not call it.*EFMLora has not seen"):
        Forgetful(trained(model)).step(lambda: None)


class Wrapper(Optimizer):
    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("config", [FlatLoraConfig, EFMLoraConfig])
def test_an_optimizer_that_hands_its_closure_on_makes_one_step(config):
    found = []
    for wrap in (lambda optimizer: optimizer, Wrapper):
        model = runs.plain_model(kind=config, rho=RHO, total_steps=STEPS).train()
        optimizer = wrap(AdamW(trained(model)))
        for data in steps():
            optimizer.step(lambda data=data, model=model, optimizer=optimizer: gradients(model, data, optimizer))
        assert perturbation(model).steps == STEPS
        found.append(model)
    assert_same_adapter(found[1], adapter(found[0]))


def test_two_models_in_one_closure():
    alone, together = ([flat_model(s, total_steps=STEPS).train() for s in range(2)] for _ in range(2))
    for models in ([alone[0]], [alone[1]], together):
        optimizer = SGD([p for model in models for p in trained(model)], lr=0.1)
        for data in steps():

            def closure(data=data, models=models, optimizer=optimizer):
                optimizer.zero_grad()
                sum(model(**data[0]).loss for model in models).backward()

            optimizer.step(closure)
    for model, expected in zip(together, alone, strict=True):
        assert perturbation(model).steps == STEPS
        assert_same_adapter(model, adapter(expected))


@pytest.fixture
def _collected_at_the_step():
    """Run the garbage collector when an optimizer makes a step, before our own hook, and at no other time."""
    handle = register_optimizer_step_pre_hook(lambda *args: gc.collect() and None)
    gc.disable()
    yield
    gc.enable()
    handle.remove()


@pytest.mark.usefixtures("_collected_at_the_step")
def test_a_model_that_the_collector_ends_during_a_step():
    other, model = flat_model(), flat_model(total_steps=STEPS).train()
    gone, cycle = weakref.ref(perturbation(other)), [other]
    cycle.append(cycle)
    optimizer = AdamW(trained(model))
    gradients(model, batches(1), optimizer)
    del other, cycle
    assert gone() is not None  # in a cycle of the user's
    optimizer.step()
    assert gone() is None
    assert perturbation(model).steps == 1
