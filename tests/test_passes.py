"""Which passes are perturbed (invariant 5), and the noise of a recomputed pass (invariant 4)."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from helpers import tiny
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatlora import FlatLoraConfig, Perturbation, get_flat_peft_model, perturbation, perturbed, unperturbed

CHECKPOINTING = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "reentrant-no-rng": {"use_reentrant": True, "preserve_rng_state": False},
    "non-reentrant-no-rng": {"use_reentrant": False, "preserve_rng_state": False},
}


@pytest.fixture
def draws(monkeypatch):
    """The samples that layers have drawn, in order."""
    seen = []
    draw = Perturbation.draw

    def spy(self, device):
        key, sample = draw(self, device)
        seen.append(sample)
        return key, sample

    monkeypatch.setattr(Perturbation, "draw", spy)
    return seen


def pair():
    return tiny.plain_model(), tiny.flat_model()


def eval_pass(model):
    return model.eval()(input_ids=tiny.tokens()).logits


def no_grad_pass(model):
    with torch.no_grad():
        return model(input_ids=tiny.tokens()).logits


def disabled_pass(model):
    with model.disable_adapter():
        return model(input_ids=tiny.tokens()).logits


def merged_pass(model):
    model.merge_adapter()
    out = model(input_ids=tiny.tokens()).logits
    model.unmerge_adapter()
    return out


def merged_and_unloaded_pass(model):
    return model.merge_and_unload()(input_ids=tiny.tokens()).logits


def generated(model):
    return model.generate(input_ids=tiny.tokens(), max_new_tokens=4, do_sample=False)


def no_grad_with_reentrant_checkpointing(model):
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with torch.no_grad():
        return model(input_ids=tiny.tokens()).logits


def backbone_under_no_grad(model):
    with torch.no_grad():
        return model.base_model.model.model(input_ids=tiny.tokens()).last_hidden_state


CLEAN = [
    eval_pass,
    no_grad_pass,
    disabled_pass,
    merged_pass,
    merged_and_unloaded_pass,
    generated,
    no_grad_with_reentrant_checkpointing,
    backbone_under_no_grad,
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of checkpoints under no_grad
@pytest.mark.parametrize("run", CLEAN, ids=lambda run: run.__name__)
def test_passes_that_do_not_train_are_those_of_plain_lora_bit_for_bit(run, draws):
    plain, flat = pair()
    assert torch.equal(run(plain), run(flat))
    assert not draws


def test_unperturbed_is_clean_in_training_mode_and_perturbed_is_noisy_in_evaluation_mode():
    plain, flat = pair()
    x = tiny.tokens()
    with unperturbed(flat):
        assert torch.equal(flat(input_ids=x).logits, plain(input_ids=x).logits)
    noisy = flat(input_ids=x).logits
    flat.eval()
    with torch.no_grad(), perturbed(flat):
        assert torch.equal(flat(input_ids=x).logits, noisy)
    with torch.no_grad(), perturbed(flat, sample=5):
        other = flat(input_ids=x).logits
    assert not torch.equal(other, noisy) and perturbation(flat).sample == 0
    assert torch.equal(flat(input_ids=x).logits, plain.eval()(input_ids=x).logits)


def test_the_inner_one_of_two_contexts_holds():
    _, flat = pair()
    x = tiny.tokens()
    clean, noisy = flat.eval()(input_ids=x).logits, flat.train()(input_ids=x).logits
    with unperturbed(flat):
        with perturbed(flat):
            assert torch.equal(flat(input_ids=x).logits, noisy)
        assert torch.equal(flat(input_ids=x).logits, clean)
    with perturbed(flat), unperturbed(flat):
        assert torch.equal(flat(input_ids=x).logits, clean)
    perturbation(flat).enabled = False
    with perturbed(flat):
        assert torch.equal(flat(input_ids=x).logits, clean)


def test_a_backward_inside_of_perturbed_leaves_the_sample_of_training():
    """A gradient is measured between the two forwards of a training step, and before its first one."""
    found = []
    for measure in (False, True):
        _, flat = pair()
        for step in range(2):
            losses = []
            for part in range(2):
                if measure:
                    with perturbed(flat, sample=1000):
                        torch.autograd.grad(tiny.loss(flat), tiny.trainable(flat))
                losses.append(tiny.loss(flat, 2 * step + part))
            sum(losses).backward()
            found.append((perturbation(flat).sample, torch.stack(losses).detach()))
    for (sample, losses), (expected, others) in zip(found[2:], found[:2], strict=True):
        assert sample == expected and torch.equal(losses, others)


def test_an_adapter_injected_after_eval_is_clean_until_the_model_trains():
    base = tiny.base_model().eval()
    model = get_flat_peft_model(base, FlatLoraConfig(**tiny.LORA, rho=0.2, schedule="constant"))
    with perturbed(model):
        noisy = model(input_ids=tiny.tokens()).logits
    assert not torch.equal(model(input_ids=tiny.tokens()).logits, noisy)
    assert torch.equal(model.train()(input_ids=tiny.tokens()).logits, noisy)


def test_every_adapted_layer_is_perturbed_once_in_a_training_pass(draws):
    _, flat = pair()
    tiny.loss(flat).backward()
    assert draws == [0] * 14  # seven linear layers in each of two blocks


@pytest.mark.parametrize("options", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointed_gradients_are_those_of_the_run_without(options, dropout):
    if dropout and not options.get("preserve_rng_state", True):
        dropout = 0.0  # without the RNG state a dropout mask cannot be repeated, the noise can
    models = [tiny.flat_model(lora_dropout=dropout) for _ in range(2)]
    models[1].enable_input_require_grads()
    models[1].gradient_checkpointing_enable(options)
    for step in range(3):
        results = []
        for model in models:
            torch.manual_seed(step)
            value = tiny.loss(model, seed=step)
            value.backward()
            results.append([value.detach(), *tiny.gradients(model)])
            model.zero_grad()
        assert tiny.same(*results)
    assert perturbation(models[1]).sample == 2


@pytest.mark.parametrize("options", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
def test_two_forwards_before_one_backward(options, draws):
    models = [tiny.flat_model() for _ in range(2)]
    models[1].enable_input_require_grads()
    models[1].gradient_checkpointing_enable(options)
    results = []
    for model in models:
        results.append([])
        for step in range(2):
            first, second = tiny.loss(model, seed=2 * step), tiny.loss(model, seed=2 * step + 1)
            (first - 2 * second).backward()
            results[-1] += tiny.gradients(model)
            model.zero_grad()
    assert tiny.same(*results)
    assert set(draws) == {0, 1}  # both forwards of a step share a sample


@pytest.mark.parametrize("options", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
def test_a_forward_between_another_forward_and_its_backward(options):
    """The order of a pipeline (1F1B): forward 1, forward 2, backward 1, forward 3, backward 2, backward 3."""
    models = [tiny.flat_model() for _ in range(2)]
    models[1].enable_input_require_grads()
    models[1].gradient_checkpointing_enable(options)
    results = []
    for model in models:
        losses = [tiny.loss(model, seed=0), tiny.loss(model, seed=1)]
        losses[0].backward()
        losses.append(tiny.loss(model, seed=2))
        assert perturbation(model).sample == 1
        losses[1].backward()
        losses[2].backward()
        results.append(tiny.gradients(model))
    assert tiny.same(*results)


def test_a_no_grad_pass_between_forward_and_backward():
    models = [tiny.flat_model() for _ in range(2)]
    models[1].enable_input_require_grads()
    models[1].gradient_checkpointing_enable({"use_reentrant": False})
    results = []
    for model in models:
        value = tiny.loss(model)
        no_grad_pass(model)
        value.backward()
        results.append(tiny.gradients(model))
    assert tiny.same(*results)


def test_the_whole_model_under_a_checkpoint():
    results = []
    for wrap in (False, True):
        model, x = tiny.flat_model(), tiny.tokens()
        out = checkpoint(model, x, use_reentrant=False) if wrap else model(x)
        out.logits.square().mean().backward()
        results.append(tiny.gradients(model))
    assert tiny.same(*results)


@pytest.mark.parametrize("settings", [{}, {"rho": 0.0}], ids=["flat", "rho=0"])
@pytest.mark.parametrize(
    "change", [lambda model: nullcontext(), unperturbed, lambda model: model.eval() and nullcontext()]
)
def test_the_whole_model_under_a_reentrant_checkpoint(change, settings):
    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.embed = model, model.get_input_embeddings()

        def forward(self, x, wrap):
            h = self.embed(x).detach().requires_grad_()
            run = lambda h: self.model(inputs_embeds=h).logits  # noqa: E731
            return checkpoint(run, h, use_reentrant=True) if wrap else run(h)

    results = []
    for wrap in (False, True):
        model = tiny.flat_model(**settings)
        with change(model):
            out = Logits(model)(tiny.tokens(), wrap)
        out.square().mean().backward()
        results.append(tiny.gradients(model))
    assert tiny.same(*results)


def test_a_module_used_twice_in_a_forward_has_one_noise():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    torch.manual_seed(0)
    model = get_flat_peft_model(
        Twice().double(), FlatLoraConfig(target_modules=["layer"], rho=0.5, schedule="constant")
    )
    layer = model.base_model.model.layer
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(6, dtype=torch.float64)
    with torch.no_grad(), perturbed(model):
        noisy = (layer(eye) - layer(0 * eye)).T  # W + eps, B being zero
    bias = layer.base_layer.bias
    out, dense = model(x), torch.tanh(x @ noisy.T + bias) @ noisy.T + bias
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-12)
    (got,), (want,) = (torch.autograd.grad(value.sum(), x, retain_graph=True) for value in (out, dense))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_pass_that_fails_leaves_the_next_one_right():
    plain, flat = pair()
    hook = flat.base_model.model.model.layers[1].register_forward_pre_hook(_fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="on purpose"):
            tiny.loss(flat)
    hook.remove()
    assert torch.equal(no_grad_pass(plain), no_grad_pass(flat))
    reference = tiny.flat_model()
    assert torch.equal(tiny.loss(flat), tiny.loss(reference))


def test_an_interrupted_pass_leaves_the_next_one_right():
    plain, flat = pair()
    hook = flat.base_model.model.model.layers[1].register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):  # torch runs its always-called hooks for an Exception only
        tiny.loss(flat)
    hook.remove()
    assert torch.equal(no_grad_pass(plain), no_grad_pass(flat))


def _fail(*_):
    raise RuntimeError("on purpose")


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_copy_of_a_model_has_a_noise_of_its_own():
    flat = tiny.flat_model()
    twin = copy.deepcopy(flat)
    assert perturbation(twin) is not perturbation(flat)
    assert torch.equal(tiny.loss(flat), tiny.loss(twin))
    perturbation(twin).rho = 0.0
    assert torch.equal(tiny.loss(twin), tiny.loss(tiny.plain_model()))
    assert not torch.equal(tiny.loss(flat), tiny.loss(twin))


def test_inject_adapter_in_model_and_add_adapter_are_perturbed_too(any_peft):
    from peft import inject_adapter_in_model

    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "rho": 0.2, "schedule": "constant", "seed": 1}
    torch.manual_seed(4)
    wrapped = get_flat_peft_model(tiny.base_model(), FlatLoraConfig(**config)).train()
    expected = tiny.loss(wrapped)
    for inject in (
        lambda model: inject_adapter_in_model(FlatLoraConfig(**config), model),
        lambda model: model.add_adapter(FlatLoraConfig(**config)) or model,
    ):
        model = tiny.base_model()
        model = inject(model).train()
        assert torch.equal(tiny.loss(model), expected)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        assert torch.equal(tiny.loss(model), expected)


def test_a_thread_of_its_own_runs_the_backward_right():
    results = []
    for threaded in (False, True):
        model = tiny.flat_model()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        value = tiny.loss(model)
        if threaded:
            worker = threading.Thread(target=value.backward)
            worker.start()
            worker.join()
        else:
            value.backward()
        results.append(tiny.gradients(model))
    assert tiny.same(*results)


@pytest.mark.parametrize("options", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
@pytest.mark.parametrize(
    "context", [unperturbed, perturbed, lambda model: perturbed(model, sample=9)], ids=["off", "on", "on-9"]
)
def test_a_backward_outside_of_the_context_recomputes_what_the_forward_was(context, options):
    models = [tiny.flat_model() for _ in range(2)]
    models[1].enable_input_require_grads()
    models[1].gradient_checkpointing_enable(options)
    results = []
    for model in models:
        with context(model):
            value = tiny.loss(model)
        value.backward()
        results.append(tiny.gradients(model))
    assert tiny.same(*results)
