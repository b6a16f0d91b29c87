"""Unusual loops: several optimizers, an optimizer that is not torch's, gradients without a backward."""

import copy

import pytest
import torch
from helpers import tiny, twin
from helpers.methods import every_method, step
from torch.optim import SGD, AdamW, Optimizer

from flatlora import (
    BarConfig,
    BiLoraConfig,
    EFMLoraConfig,
    FlatLoraConfig,
    get_flat_peft_model,
    perturbation,
    perturbed,
)


def flat_model(**settings):
    return twin.adapted(FlatLoraConfig, rho=0.2, seed=1, **settings)


def optimizers_of(model):
    """One for each parameter."""
    return {p: SGD([p], lr=0.1) for p in twin.trainable(model)}


def after_the_backward(model):
    optimizers = optimizers_of(model)
    for i in range(3):
        twin.loss(model, i).backward()
        for optimizer in reversed(optimizers.values()):
            optimizer.step()
            optimizer.zero_grad()


def in_the_backward(model, loss=twin.loss):
    optimizers = optimizers_of(model)

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    for i in range(3):
        loss(model, i).backward()


LOOPS = pytest.mark.parametrize("loop", [after_the_backward, in_the_backward], ids=lambda loop: loop.__name__)


@LOOPS
def test_an_optimizer_for_each_parameter_makes_the_steps_of_one(loop):
    models = [flat_model(schedule="linear", total_steps=4) for _ in range(2)]
    optimizer = SGD(twin.trainable(models[0]), lr=0.1)
    for i in range(3):
        step(models[0], optimizer, i)
    loop(models[1])
    assert tiny.same(*map(twin.trainable, models))
    assert [(perturbation(m).steps, perturbation(m).sample) for m in models] == [(3, 2)] * 2


@LOOPS
@pytest.mark.parametrize("kind", [EFMLoraConfig, BiLoraConfig, BarConfig])
def test_a_method_that_uses_gradients_refuses_to_see_them_one_by_one(kind, loop):
    with pytest.raises(RuntimeError, match=r"divided among several optimizers. Give all of them to one SGD"):
        loop(twin.adapted(kind, rho=0.2, schedule="constant"))
    loop(twin.adapted(kind, rho=0.0, schedule="constant"))


def test_an_optimizer_for_other_parameters_is_none_of_the_methods_business():
    model, head = twin.adapted(EFMLoraConfig, rho=0.2), torch.nn.Parameter(torch.ones(()))
    optimizers = [SGD([head], lr=0.1), SGD(twin.trainable(model), lr=0.1)]
    (twin.loss(model, 0) * head).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert perturbation(model).steps == 1


def by_hand(model, set_step=False):
    for i in range(3):
        for half in range(2):
            twin.loss(model, 2 * i + half).backward()
        with torch.no_grad():
            for p in twin.trainable(model):
                p -= 0.1 * p.grad
                p.grad = None
        if set_step:
            perturbation(model).set_step(i + 1)


NEED_STEPS = [
    (FlatLoraConfig, {"schedule": "cosine", "total_steps": 5}),
    (FlatLoraConfig, {"schedule": "inverse_sqrt"}),
    (FlatLoraConfig, {"schedule": "constant", "resample": "step"}),
    (EFMLoraConfig, {"schedule": "constant"}),
]


@pytest.mark.parametrize("kind, settings", NEED_STEPS)
def test_steps_that_nobody_sees_are_warned_of_where_they_count(kind, settings):
    with pytest.warns(UserWarning, match=r"not a torch.optim.Optimizer.*set_step") as caught:
        by_hand(twin.adapted(kind, rho=0.2, **settings))
    assert len(caught) == 1
    if kind is FlatLoraConfig:
        by_hand(twin.adapted(kind, rho=0.2, **settings), set_step=True)


def test_steps_that_nobody_sees_do_not_matter_to_noise_whose_strength_is_constant_or_set():
    by_hand(flat_model(schedule="constant"))
    model = flat_model(schedule="cosine", total_steps=5)
    perturbation(model).progress = 0.5
    by_hand(model)


def zeroth_order(model, perturb=False):
    """A step like MeZO's: the gradient is made from losses."""
    optimizer = SGD(twin.trainable(model), lr=0.1)
    for i in range(2):
        with torch.no_grad():
            loss = twin.loss(model, i) if not perturb else _loss_at_noise(model, i)
            for p in twin.trainable(model):
                p.grad = torch.full_like(p, loss.item())
        optimizer.step()
        optimizer.zero_grad()


def _loss_at_noise(model, i):
    with perturbed(model):
        return twin.loss(model, i)


def test_gradients_without_a_backward_are_warned_of_once_and_can_be_perturbed():
    with pytest.warns(UserWarning, match=r"passes under no_grad.*inside `with flatlora.perturbed") as caught:
        zeroth_order(flat_model(schedule="constant"))
    assert len(caught) == 1
    zeroth_order(flat_model(schedule="constant"), perturb=True)


@every_method
def test_a_model_that_changes_its_dtype_between_two_steps(kind, settings):
    model = twin.adapted(kind, rho=0.1, schedule="constant", **settings)  # float64
    step(model, SGD(twin.trainable(model), lr=0.1), 0)
    model.float()
    step(model, SGD(twin.trainable(model), lr=0.1), 1, lambda model, i: model(twin.batch(i)[0].float()).square().mean())
    assert all(p.isfinite().all() for p in twin.trainable(model))


class WithoutMaximize(Optimizer):
    """An optimizer like Adafactor and Lion: it cannot maximize, and its `eps` is no number."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "eps": (1e-30, 1e-3), "weight_decay": 0.1})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad


def test_the_second_module_of_bilora_climbs_with_adamw_where_the_optimizer_cannot():
    model = twin.adapted(BiLoraConfig, rho=0.2, schedule="constant")
    optimizer = WithoutMaximize(twin.trainable(model), lr=0.1)
    for i in range(2):
        step(model, optimizer, i)
    ascent = perturbation(model).method_state.optimizer
    assert type(ascent) is AdamW and ascent.param_groups[0]["lr"] == 0.1 and ascent.param_groups[0]["maximize"]
    assert all(tensor.any() for tensor in perturbation(model).tensors().values())
    with pytest.raises(RuntimeError, match="WithoutMaximize has lr=None: set one"):
        step(model, WithoutMaximize(twin.trainable(model), lr=None), 0)


SUBSETS = {
    "only B": lambda name: "lora_B" in name,
    "only A": lambda name: "lora_A" in name,
    "the last layer": lambda name: ".2." in name or "second" in name,
}


@pytest.mark.parametrize("chosen", SUBSETS.values(), ids=SUBSETS.keys())
@every_method
def test_an_optimizer_of_some_of_the_factors_makes_steps_too(kind, settings, chosen):
    model = twin.adapted(kind, rho=0.2, **{"total_steps": 5} | settings)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    held = [p for name, p in model.named_parameters() if p.requires_grad and chosen(name)] or twin.trainable(model)[-2:]
    assert len(held) < len(names)
    optimizer = SGD(held, lr=0.1)
    for i in range(3):
        step(model, optimizer, i)
    assert perturbation(model).steps == 3


def test_optimizers_of_parts_that_come_one_after_another():
    model = flat_model(schedule="linear", total_steps=8, resample="step")
    parameters = twin.trainable(model)
    for part in (parameters[2:], parameters[:2], parameters[1:2]):
        optimizer = SGD(part, lr=0.1)
        for i in range(2):
            step(model, optimizer, i)
    assert (perturbation(model).steps, perturbation(model).sample) == (6, 6)


def test_of_optimizers_without_the_first_factor_the_one_that_goes_on_counts():
    model = flat_model(schedule="linear", total_steps=9)
    first, second = (SGD(part, lr=0.1) for part in (twin.trainable(model)[2:4], twin.trainable(model)[4:]))
    for i in range(2):
        step(model, first, i)
        assert perturbation(model).steps == i + 1
    for i in range(3):  # its first step may belong to the last one of the other
        step(model, second, i)
        assert perturbation(model).steps == 2 + i


def states(*stateful):
    return [copy.deepcopy(each.state_dict()) for each in stateful]


def load(stateful, kept):
    for each, state in zip(stateful, copy.deepcopy(kept), strict=True):  # torch goes on counting in the loaded state
        each.load_state_dict(state)


def find_learning_rate(model, optimizer, order):
    """Find a learning rate like Lightning and torch-lr-finder: save both states, make some steps, load them again."""
    parts = [(model, optimizer)[i] for i in order]
    kept = states(*parts)
    for i in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 2**i
        step(model, optimizer, i)
    load(parts, kept)


OPTIMIZERS = pytest.mark.parametrize(
    "kind", [SGD, AdamW, lambda p, lr: SGD(p, lr=lr, momentum=0.9)], ids=["SGD", "AdamW", "momentum"]
)


@OPTIMIZERS
@pytest.mark.parametrize("resample", ["forward", "step"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["model first", "optimizer first"])
def test_steps_of_a_learning_rate_finder_do_not_count(order, kind, resample):
    results = []
    for find in (False, True):
        model = flat_model(schedule="linear", total_steps=8, resample=resample)
        optimizer = kind(twin.trainable(model), lr=0.1)
        if find:
            find_learning_rate(model, optimizer, order)
        for i in range(3):
            step(model, optimizer, i)
        results.append((perturbation(model).steps, perturbation(model).sample, twin.trainable(model)))
    assert results[0][:2] == results[1][:2]
    assert tiny.same(results[0][2], results[1][2])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["model first", "optimizer first"])
def test_a_rollback_in_the_middle_takes_the_steps_since_then_back(order):
    model = flat_model(schedule="linear", total_steps=8)
    optimizer = AdamW(twin.trainable(model), lr=0.1)
    parts = [(model, optimizer)[i] for i in order]
    for i in range(3):
        step(model, optimizer, i)
    kept = states(*parts)
    load(parts, kept)
    assert perturbation(model).steps == 3  # nothing has happened since
    for i in range(2):
        step(model, optimizer, i)
    load(parts, kept)
    step(model, optimizer, 2)
    assert perturbation(model).steps == 4
    assert perturbation(model).rho_t == pytest.approx(0.2 * 4 / 8)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2), (1, 2, 0), (2, 1, 0)], ids=str)
def test_a_rollback_with_the_state_of_the_noise_is_taken_once(order):
    model = flat_model(schedule="linear", total_steps=20)
    optimizer = AdamW(twin.trainable(model), lr=0.1)
    parts = [(model, optimizer, perturbation(model))[i] for i in order]
    for i in range(5):
        step(model, optimizer, i)
    kept = states(*parts)
    for i in range(5):
        step(model, optimizer, i)
    load(parts, kept)
    step(model, optimizer, 5)
    assert (perturbation(model).steps, perturbation(model).sample) == (6, 5)


def through_data(model, values):
    for p, value in zip(twin.trainable(model), values, strict=True):
        p.data = value.clone()


@OPTIMIZERS
@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["model first", "optimizer first"])
def test_a_rollback_through_data_with_an_evaluation_in_between(order, evaluated, kind):
    model = flat_model(schedule="linear", total_steps=20)
    optimizer, state = kind(twin.trainable(model), lr=0.1), perturbation(model)
    for i in range(2):
        step(model, optimizer, i)
    values, kept = [p.detach().clone() for p in twin.trainable(model)], states(optimizer)
    for i in range(4):
        step(model, optimizer, i)
    for part in order:
        load([optimizer], kept) if part else through_data(model, values)
        if evaluated:
            with torch.no_grad():
                twin.loss(model, 0)
    assert state.state_dict()["steps"] == state.steps == 2


@pytest.mark.parametrize("project", [False, True], ids=["", "projected after each step"])
@pytest.mark.parametrize("count", [1, 2], ids=["one optimizer", "two"])
def test_optimizers_alone_that_load_an_earlier_state_take_no_step_back(count, project):
    model = flat_model(schedule="linear", total_steps=20)
    optimizers = [AdamW(twin.trainable(model)[i::count], lr=0.1) for i in range(count)]

    def both(i):
        twin.loss(model, i).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for p in twin.trainable(model) if project else ():
            p.data.clamp_(-0.5, 0.5)

    for i in range(2):
        both(i)
    parts = [model, *optimizers]
    kept = states(*parts)
    for i in range(3):
        both(i)
    load(optimizers, kept[1:])
    both(5)
    assert perturbation(model).steps == 6
    load(parts, kept)
    both(2)
    assert perturbation(model).steps == 3


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["model first", "optimizer first"])
def test_the_start_of_a_resumed_run_is_where_it_was_resumed(order):
    """A learning rate finder in a new process, and a new optimizer with the rate that it has found."""
    model = flat_model(schedule="linear", total_steps=200)
    perturbation(model).set_step(100)
    optimizer = AdamW(twin.trainable(model), lr=0.1)
    find_learning_rate(model, optimizer, order)
    optimizer = AdamW(twin.trainable(model), lr=0.01)
    step(model, optimizer, 0)
    assert perturbation(model).steps == 101


def test_an_optimizer_for_each_parameter_under_reentrant_checkpoints_counts_once():
    model = tiny.flat_model(rho=0.2)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    in_the_backward(model, tiny.loss)
    assert (perturbation(model).steps, perturbation(model).sample) == (3, 2)


@OPTIMIZERS
@pytest.mark.parametrize("average", [False, True], ids=["", "federated"])
def test_an_optimizer_that_is_reset_in_each_round_goes_on(average, kind):
    model = flat_model(schedule="linear", total_steps=12)
    optimizer = kind(twin.trainable(model), lr=0.1)
    (fresh,) = states(optimizer)
    for rounds in range(1, 4):
        optimizer.load_state_dict(copy.deepcopy(fresh))
        for i in range(3):
            step(model, optimizer, i)
            optimizer.param_groups[0]["lr"] *= 0.9
        if average:  # with the other clients
            model.load_state_dict({name: 0.5 * p for name, p in model.state_dict().items()})
        assert (perturbation(model).steps, perturbation(model).sample) == (3 * rounds, 3 * rounds - 1)


@OPTIMIZERS
def test_options_that_are_set_by_a_state_take_no_step_back(kind):
    model = flat_model(schedule="linear", total_steps=8)
    optimizer = kind(twin.trainable(model), lr=0.1)
    for i in range(3):
        step(model, optimizer, i)
    (state,) = states(optimizer)
    state["param_groups"][0]["lr"] = 0.01
    optimizer.load_state_dict(state)
    step(model, optimizer, 3)
    assert perturbation(model).steps == 4


def test_steps_that_change_nothing_count_when_options_are_set_by_a_state():
    """A warm-up from 0: the adapter has the values of the start, and the run is where its latest state was saved."""
    model = flat_model(schedule="linear", total_steps=8)
    optimizer = SGD(twin.trainable(model), lr=0.0)
    for i in range(2):
        step(model, optimizer, i)
    (state,) = states(optimizer)
    state["param_groups"][0]["lr"] = 0.1
    optimizer.load_state_dict(state)
    step(model, optimizer, 2)
    assert perturbation(model).steps == 3


def test_optimizer_states_of_two_tasks_in_turn():
    model = flat_model(schedule="linear", total_steps=12)
    optimizer, kept = AdamW(twin.trainable(model), lr=0.1), [None, None]
    for rounds in range(1, 5):
        if kept[rounds % 2] is not None:
            optimizer.load_state_dict(kept[rounds % 2])
        for i in range(3):
            step(model, optimizer, i)
        (kept[rounds % 2],) = states(optimizer)
        assert perturbation(model).steps == 3 * rounds


def test_the_first_step_of_a_warmup_counts_where_layers_are_called_one_by_one():
    net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(2)])
    config = FlatLoraConfig(target_modules=["0", "1"], rho=0.2, schedule="linear", total_steps=4)
    model = get_flat_peft_model(net, config).train()
    optimizer = SGD(twin.trainable(model), lr=0.1)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    for i in range(3):
        x = torch.ones(2, 8)
        for layer in net:
            x = layer(x)
        x.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        assert perturbation(model).steps == i + 1
