"""`averaged`, the mean prediction over noise in the merged weight, and the strength that `perturbed` takes."""

import threading

import pytest
import torch
from helpers import dense, tiny
from helpers.noise import epsilon
from torch import nn

import flatlora
from flatlora import FlatLoraConfig, averaged, get_flat_peft_model, perturbation, perturbed, unperturbed
from flatlora.layers.flat_layer import flat_layers

FIRST = 2**32 - 2**16  # samples of `averaged` count from here


def mlp(rho=0.3, config=FlatLoraConfig, **options):
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["0", "2"], "rho": rho, **options}
    model = get_flat_peft_model(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), config(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def inputs(rows=5):
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(model, x, samples, rho):
    """The mean of the softmax over dense weights W + sBA + eps_k."""
    first, second = flat_layers(model)
    total = 0.0
    for k in range(samples):
        out = x
        for layer in (first, second):
            weight = dense.merged(layer).detach()
            eps = epsilon(weight, layer.stream, rho=rho, seed=perturbation(model).seed, sample=FIRST + k)
            out = nn.functional.linear(out, weight + eps, layer.get_base_layer().bias)
            out = out.tanh() if layer is first else out
        total = total + out.softmax(-1)
    return total / samples


@pytest.mark.parametrize("schedule, total_steps", [("cosine", 10), ("constant", None)])
def test_probabilities_are_the_mean_over_dense_perturbed_weights(schedule, total_steps):
    model = mlp(schedule=schedule, total_steps=total_steps)  # cosine is at 0 here: averaged takes rho, not rho_t
    found = averaged(model, samples=3)(inputs())
    torch.testing.assert_close(found, by_hand(model, inputs(), 3, 0.3))
    assert found.dtype == torch.float64 and not found.requires_grad
    other = averaged(model, samples=3, rho=0.7)(inputs())
    torch.testing.assert_close(other, by_hand(model, inputs(), 3, 0.7))


def test_logits_are_averaged_before_the_softmax():
    model = mlp()
    logits = []
    for k in range(4):
        with torch.no_grad(), perturbed(model, sample=FIRST + k, rho=0.3):
            logits.append(model(inputs()))
    mean = torch.stack(logits).mean(0)
    torch.testing.assert_close(averaged(model, samples=4, of="logits")(inputs()), mean)
    assert not torch.allclose(averaged(model, samples=4)(inputs()), mean.softmax(-1), atol=1e-6)


def test_a_language_model_gives_probabilities_of_its_logits_and_stays_as_it_was():
    model = tiny.flat_model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = tiny.tokens()
    found = averaged(model, samples=2)(input_ids=x)
    assert found.shape == (*x.shape, tiny.TOKENS) and found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), torch.ones(x.shape))
    assert torch.equal(found, averaged(model, samples=2)(input_ids=x))  # the same samples in every call
    assert perturbation(model).sample == 0 and perturbation(model).rho_t == 0.2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_around_it_keeps_its_bits():
    losses = []
    for predicts in (False, True):
        model = tiny.flat_model(schedule="cosine", total_steps=4)
        optimizer = torch.optim.AdamW(tiny.trainable(model), lr=1e-2)
        losses.append([])
        for _ in range(4):
            if predicts:
                averaged(model.eval(), samples=2)(input_ids=tiny.tokens())
                model.train()
            loss = tiny.loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("config, options", [(FlatLoraConfig, {}), (flatlora.RwpConfig, {"space": "adapter"})])
def test_the_strength_of_perturbed_is_that_of_a_model_with_this_rho(config, options):
    own, other = (mlp(rho, config, schedule="constant", seed=3, **options) for rho in (0.5, 0.0))
    with torch.no_grad():
        with perturbed(own, sample=7):
            expected = own(inputs())
        with perturbed(other, sample=7, rho=0.5):
            assert torch.equal(other(inputs()), expected)
        with perturbed(own, sample=7, rho=0):
            assert torch.equal(own(inputs()), other(inputs()))
    assert perturbation(other).rho == 0


def test_the_strength_is_that_of_one_thread():
    model = mlp(schedule="constant")
    found = {}

    def elsewhere():
        with torch.no_grad(), perturbed(model, sample=2):
            found["other"] = model(inputs())

    with torch.no_grad(), perturbed(model, sample=2):
        expected = model(inputs())
    with perturbed(model, sample=2, rho=0.9):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert torch.equal(found["other"], expected)


def test_a_thread_that_leaves_its_context_takes_no_strength_from_another_one():
    model = mlp(rho=0, schedule="constant")

    def elsewhere():
        with unperturbed(model):
            model(inputs())

    with torch.no_grad(), perturbed(model, sample=2, rho=0.9):
        expected = model(inputs())
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert torch.equal(model(inputs()), expected)
    assert not torch.equal(model(inputs()), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_a_recompute_has_the_strength_of_its_forward(rho, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = tiny.flat_model(rho=rho)
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with perturbed(model, sample=3, rho=0.6):
            loss = tiny.loss(model)
        loss.backward()
        gradients.append(tiny.gradients(model))
    assert tiny.same(*gradients)
    model = tiny.flat_model(rho=0.6)
    with perturbed(model, sample=3):
        loss = tiny.loss(model)
    loss.backward()
    assert tiny.same(tiny.gradients(model), gradients[0])


def test_compiled_models_give_the_same():
    model = mlp(schedule="constant")
    compiled = torch.compile(model, backend="aot_eager")
    expected = averaged(model, samples=2, rho=0.4)(inputs())
    torch.testing.assert_close(averaged(compiled, samples=2, rho=0.4)(inputs()), expected)
    torch.testing.assert_close(compiled(inputs()), model(inputs()))


def test_the_mean_comes_nearer_to_the_expectation_as_one_over_the_root_of_the_samples():
    model = mlp(rho=0.5)
    x = inputs(50)
    far = averaged(model, samples=4096)(x)
    errors = [(averaged(model, samples=k)(x) - far).square().mean().sqrt() for k in (4, 64)]
    # the ratio is 4 in expectation; 300 numbers from two layers' noise scatter it by far less than a factor of 2
    assert 2 < errors[0] / errors[1] < 8


@pytest.mark.parametrize(
    "prepare, match",
    [
        (lambda model: model.train(), r"call model.eval\(\)"),
        (lambda model: model.merge_adapter(), "no flat adapter is active and unmerged"),
        (lambda model: setattr(perturbation(model), "rho", 0), "give averaged a rho"),
        (lambda model: setattr(perturbation(model), "enabled", False), "switched off here"),
    ],
    ids=["training", "merged", "rho-0", "disabled"],
)
def test_a_prediction_without_noise_is_an_error(prepare, match):
    model = mlp()
    prepare(model)
    with pytest.raises(RuntimeError, match=match):
        averaged(model)(inputs())


def test_contexts_that_switch_the_noise_off_are_an_error_too():
    model = mlp()
    with unperturbed(model), pytest.raises(RuntimeError, match="switched off here"):
        averaged(model)(inputs())
    with model.disable_adapter(), pytest.raises(RuntimeError, match="no flat adapter is active"):
        averaged(model)(inputs())


@pytest.mark.parametrize(
    "config", [flatlora.FMLoraConfig, flatlora.EFMLoraConfig, flatlora.LoraSamConfig, flatlora.BiLoraConfig]
)
def test_methods_without_random_noise_are_refused(config):
    with pytest.raises(TypeError, match="averaged is for methods with random noise"):
        averaged(mlp(0.1, config))


def test_an_output_without_logits_is_refused():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return {"scores": self.layer(x)}

    model = get_flat_peft_model(Named(), FlatLoraConfig(r=2, target_modules=["layer"], rho=0.1)).eval()
    with pytest.raises(TypeError, match=r"has \.logits, got dict"):
        averaged(model)(inputs().float())


def test_probabilities_of_one_logit_are_refused():
    config = FlatLoraConfig(r=2, target_modules=["0"], rho=0.1, schedule="constant", init_lora_weights=False)
    model = get_flat_peft_model(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1)).double(), config).eval()
    with pytest.raises(ValueError, match='two or more classes, got one logit.*of="logits"'):
        averaged(model)(inputs())
    assert averaged(model, of="logits")(inputs()).unique().numel() == 5
