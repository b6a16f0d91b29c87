"""A recomputed layer has the noise of its own forward, whoever calls it (invariants 4, 5 and 10)."""

import weakref

import pytest
import torch
from helpers import tiny
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from flatlora import FlatLoraConfig, get_flat_peft_model, perturbation, perturbed, unperturbed

X = torch.randn(4, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.run = None

    def features(self, x):
        for block in self.blocks:
            x = block(x) if self.run is None else self.run(block, x)
        return x

    def forward(self, x):
        return self.features(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(8, 2)

    def encode(self, x):
        return self.backbone.features(x)

    def forward(self, x):
        return self.head(self.backbone(x))


def backward_of_a_rerun(run, x, grad):
    """The gradient for x of a forward that is computed again."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        torch.autograd.backward(run(x), grad)
    return x.grad


class ByFunction(torch.autograd.Function):
    """A custom checkpoint, like those of DeepSpeed, Unsloth and fairscale."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, grad):
        return None, backward_of_a_rerun(ctx.run, *ctx.saved_tensors, grad)


class ByFunctionOfOtherNames(torch.autograd.Function):
    """`ByFunction` with other names than torch's."""

    @staticmethod
    def forward(self, run, x):
        self.kept = run, x
        return run(x)

    @staticmethod
    def vjp(node, grad):
        return None, backward_of_a_rerun(*node.kept, grad)


class ByFunctionWithSetup(torch.autograd.Function):
    """`ByFunction` whose forward has no ctx."""

    @staticmethod
    def forward(run, x):
        return run(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kept = inputs

    @staticmethod
    def backward(ctx, grad):
        return None, backward_of_a_rerun(*ctx.kept, grad)


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def non_reentrant(block, x):
    return checkpoint(block, x, use_reentrant=False)


def nested(block, x):
    return checkpoint(lambda x: checkpoint(block, x, use_reentrant=False), x, use_reentrant=False)


def nested_reentrant(block, x):
    return checkpoint(lambda x: checkpoint(block, x, use_reentrant=True), x, use_reentrant=True)


def reentrant_in_non_reentrant(block, x):
    return checkpoint(lambda x: torch.tanh(reentrant(block, x)).atanh(), x, use_reentrant=False)


def selective(block, x):
    def save_products(ctx, op, *args, **kwargs):
        kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.tanh.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(save_products)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


def own_function(block, x):
    return ByFunction.apply(block, x)


def own_function_of_other_names(block, x):
    return ByFunctionOfOtherNames.apply(block, x)


def composable(block, x):
    from torch.distributed._composable import checkpoint as by_hooks

    if not getattr(block, "_by_hooks", False):
        by_hooks(block)
        block._by_hooks = True
    return block(x)


def inside_hooks(block, x):
    """Hooks of the user on the saved tensors of the block hide those of the checkpoint."""

    def run(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            out = block(x)
        return torch.tanh(out).atanh()

    return checkpoint(run, x, use_reentrant=False)


WAYS = [
    *(reentrant, non_reentrant, nested, nested_reentrant, reentrant_in_non_reentrant),
    *(selective, own_function, own_function_of_other_names, composable, inside_hooks),
]
ways = pytest.mark.parametrize("run", WAYS, ids=lambda run: run.__name__)


def net(**settings):
    torch.manual_seed(0)
    settings = {"rho": 0.3, "schedule": "constant", "seed": 7, "init_lora_weights": False} | settings
    targets = ["head", *(f"backbone.blocks.{i}.1" for i in range(3))]
    return get_flat_peft_model(Net().double(), FlatLoraConfig(target_modules=targets, **settings)).train()


def gradients(model):
    return [p.grad.clone() for p in tiny.trainable(model) if p.grad is not None]


def by_call(model, x):
    return model(x)


def by_method(model, x):
    return model.base_model.model.encode(x)


def results(call, run, between=lambda model: None, after=lambda model: None):
    """(output, gradients) of a pass whose blocks are checkpointed by `run`, after one pass without checkpoints."""
    model = net(schedule="linear")
    perturbation(model).progress = 1.0
    model(X).square().sum().backward()
    model.zero_grad()
    model.base_model.model.backbone.run = run
    out = call(model, X.clone().requires_grad_())
    model.base_model.model.backbone.run = None
    after(model)
    between(model)
    model.zero_grad()
    out.square().sum().backward()
    return [out.detach(), *gradients(model)]


@ways
@pytest.mark.parametrize("call", [by_call, by_method], ids=lambda call: call.__name__)
def test_gradients_are_those_of_the_same_pass_without_checkpointing(call, run):
    for got, want in zip(results(call, run), results(call, None), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def another_step(model):
    model(X).square().sum().backward()
    model(X + 1).square().sum().backward()


def to_evaluation(model):
    model.eval()


def switched_off(model):
    perturbation(model).enabled = False


def weaker(model):
    perturbation(model).rho = 0.01


def without_noise(model):
    perturbation(model).rho = 0


def further(model):
    perturbation(model).progress = 0.5


def other_seed(model):
    perturbation(model).seed = 8


@ways
@pytest.mark.parametrize("call", [by_call, by_method], ids=lambda call: call.__name__)
@pytest.mark.parametrize(
    "between",
    [another_step, to_evaluation, switched_off, weaker, without_noise, further, other_seed],
    ids=lambda f: f.__name__,
)
def test_what_runs_between_forward_and_backward_does_not_matter(between, call, run):
    for got, want in zip(results(call, run, between), results(call, None, between), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_sequential_over_the_layers(use_reentrant):
    found = []
    for parts in (None, 2):
        torch.manual_seed(0)
        layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]).double()
        config = FlatLoraConfig(target_modules=list("0123"), rho=0.3, schedule="constant", init_lora_weights=False)
        model = get_flat_peft_model(layers, config).train()
        x = X.clone().requires_grad_()
        out = model(x) if parts is None else checkpoint_sequential(layers, parts, x, use_reentrant=use_reentrant)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *gradients(model)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_a_forward_in_a_backward_that_belongs_to_no_checkpoint_is_an_error():
    """A loss that caches gradients by hand: its first pass looks like an evaluation."""

    def loss(model):
        with torch.no_grad():
            out = model(X)

        def again(grad):
            with torch.enable_grad():
                torch.autograd.backward(model(X), grad)

        out.requires_grad_().register_hook(again)
        return out.square().sum()

    with pytest.raises(RuntimeError, match=r"noise of its first forward is not known.*perturbed\(model, sample=step\)"):
        loss(net()).backward()
    loss(net(rho=0.0)).backward()
    loss(net().eval()).backward()
    model = net()
    with unperturbed(model):
        loss(model).backward()
    model, reference = net(), net()
    with perturbed(model, sample=3):
        loss(model).backward()
    with perturbed(reference, sample=3):
        reference(X).square().sum().backward()
    for got, want in zip(gradients(model), gradients(reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_a_function_whose_forward_has_no_ctx_is_an_error():
    model = net()
    model.base_model.model.backbone.run = lambda block, x: ByFunctionWithSetup.apply(block, x)
    with pytest.raises(RuntimeError, match=r"an autograd Function whose forward has ctx as its first argument"):
        model(X.clone().requires_grad_()).square().sum().backward()
    with unperturbed(model):
        model(X.clone().requires_grad_()).square().sum().backward()


def test_a_step_of_another_optimizer_between_forward_and_backward():
    """Two towers whose losses are computed together, with an optimizer each: the first one's step goes up the ramp."""
    found = []
    for run in (None, reentrant, non_reentrant):
        model = net(schedule="linear", total_steps=4)
        layers = model.base_model.model.backbone.blocks
        optimizer = torch.optim.SGD([p for p in layers[0].parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            x = X.clone().requires_grad_()
            first, second = (layer(x) if run is None else run(layer, x) for layer in layers[:2])
            first.square().sum().backward()
            optimizer.step()
            model.zero_grad()
            second.square().sum().backward()
        assert perturbation(model).steps == 2
        found.append(gradients(model))
    for got in found[1:]:
        assert tiny.same(got, found[0])


def test_a_tensor_that_a_forward_deletes_is_freed_before_it_returns():
    model, alive = net(), []

    def forward(x):
        hidden = torch.tanh(x)
        reference = weakref.ref(hidden)
        x = model.base_model.model.backbone.blocks[0](x.detach().requires_grad_())
        del hidden
        alive.append(reference() is not None)
        return x

    x = X.clone().requires_grad_()
    reentrant(forward, x).sum().backward()
    assert alive == [False, False]


def clean_and_noisy(model, x):
    with unperturbed(model):
        clean = model(x)
    return (clean - model(x)).square().sum() + clean.square().sum()


def noisy_and_clean(model, x):
    noisy = model(x)
    with unperturbed(model):
        clean = model(x)
    return (clean - noisy).square().sum() + clean.square().sum()


def two_samples(model, x):
    with perturbed(model, sample=1):
        first = model(x)
    with perturbed(model, sample=2):
        return first.square().sum() - model(x).pow(3).sum()


def two_strengths(model, x):
    with perturbed(model, rho=0.1):
        first = model(x)
    with perturbed(model, rho=0.9):
        return first.square().sum() - model(x).pow(3).sum()


@pytest.mark.parametrize("function", [clean_and_noisy, noisy_and_clean, two_samples, two_strengths])
@pytest.mark.parametrize("run", [reentrant, non_reentrant])
def test_several_contexts_inside_of_one_checkpoint(run, function):
    found = []
    for checkpointed in (False, True):
        model, x = net(), X.clone().requires_grad_()
        out = run(lambda x, model=model: function(model, x), x) if checkpointed else function(model, x)
        out.backward(retain_graph=True)
        out.backward()  # a second recompute
        found.append([out.detach(), x.grad, *gradients(model)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


class Recycle(nn.Module):
    """Self-conditioning: a first pass under no_grad inside of the forward."""

    def __init__(self):
        super().__init__()
        self.f, self.inner = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))

    def forward(self, x):
        with torch.no_grad():
            self.seen = self.inner(self.f(x))
        return self.f(x + self.seen)


@pytest.mark.parametrize("wrap", [None, non_reentrant], ids=["", "checkpointed"])
def test_a_no_grad_block_inside_of_a_training_forward_is_clean(wrap):
    found = {}
    for rho in (0.0, 0.3):
        torch.manual_seed(0)
        config = FlatLoraConfig(target_modules=["f", "inner.0"], rho=rho, schedule="constant", init_lora_weights=False)
        model = get_flat_peft_model(Recycle().double(), config).train()
        x = X.clone().requires_grad_()
        out = model(x) if wrap is None else wrap(model, x)
        found[rho] = out.detach(), model.base_model.model.seen
        out.square().sum().backward()
        assert torch.equal(model.base_model.model.seen, found[rho][1])  # also in the recompute
    assert torch.equal(found[0.0][1], found[0.3][1]) and not torch.equal(found[0.0][0], found[0.3][0])


class Again(torch.autograd.Function):
    """A checkpoint of the user's own, whose context has another name than torch's."""

    @staticmethod
    def forward(kept, x, function):
        kept.function, kept.x = function, x.detach()
        return function(x)

    @staticmethod
    def backward(kept, grad):
        with torch.enable_grad():
            x = kept.x.requires_grad_()
            torch.autograd.backward(kept.function(x), grad)
        return x.grad, None


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return Again.apply(x, self.layer).square()


def test_a_forward_in_the_backward_of_a_clean_pass_has_no_noise():
    config = FlatLoraConfig(target_modules=["layer"], rho=0.3, schedule="constant", init_lora_weights=False)
    model = get_flat_peft_model(Checkpointed(), config).train()
    x = torch.randn(2, 6, requires_grad=True)
    gradients = []
    for rho in (0.3, 0.0):
        perturbation(model).rho = rho
        with unperturbed(model):
            loss = model(x).sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in (x, *model.parameters()) if p.requires_grad])
        x.grad = None
        model.zero_grad()
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)
