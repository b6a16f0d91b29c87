"""`torch.compile` of plain linear layers: one graph, no recompilation from step to step, the noise of the eager run."""

import threading
from contextlib import contextmanager

import pytest
import torch
from helpers import tiny
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from flatlora import FlatLoraConfig, get_flat_peft_model, perturbation, perturbed, unperturbed


class Net(torch.nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(3)])
        self.checkpointed = checkpointed

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
            x = torch.nn.functional.gelu(x)
        return x


def model(checkpointed=False, **kwargs):
    torch.manual_seed(0)
    options = {"rho": 0.2, "schedule": "linear", "total_steps": 8, "seed": 3, "r": 2, "target_modules": ["0", "1", "2"]}
    flat = get_flat_peft_model(Net(checkpointed), FlatLoraConfig(**options | kwargs)).train()
    with torch.no_grad():
        for name, parameter in flat.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return flat


def train(run, flat, steps=5, dtype=None):
    optimizer = torch.optim.SGD(tiny.trainable(flat), lr=0.1)
    losses, samples = [], []
    for step in range(steps):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            loss = run(x).square().mean()
        samples.append(perturbation(flat).sample)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), samples


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_no_recompilation_and_the_noise_of_the_eager_run(backend, checkpointed):
    eager, compiled = model(checkpointed), model(checkpointed)
    expected = train(eager, eager)
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(compiled, backend=counter, fullgraph=True)
    got = train(run, compiled)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    assert got[1] == expected[1] == [0, 1, 2, 3, 4]
    assert counter.frame_count == 1 and not counters["graph_break"]
    for ours, theirs in zip(tiny.trainable(compiled), tiny.trainable(eager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_training_and_evaluation_are_two_graphs():
    flat = model()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(flat, backend=counter, fullgraph=True)
    x = torch.randn(4, 16)
    for _ in range(3):
        run(x).sum().backward()
        flat.eval()
        assert torch.equal(run(x), flat(x))
        flat.train()
    assert counter.frame_count == 2


def test_autocast_under_compile():
    eager, compiled = model(), model()
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    got, expected = train(run, compiled, dtype=torch.bfloat16), train(eager, eager, dtype=torch.bfloat16)
    torch.testing.assert_close(got[0], expected[0], rtol=0.02, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, after a graph break
def test_other_layers_break_the_graph_and_stay_right():
    eager, compiled = model(use_dora=True), model(use_dora=True)
    got, expected = train(torch.compile(compiled, backend="aot_eager"), compiled), train(eager, eager)
    assert counters["graph_break"]
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    assert got[1] == expected[1]


@pytest.mark.parametrize("requires", [(True, False, False), (True, True, True), (False, True, False)], ids=str)
def test_the_operators_pass_opcheck(requires):
    x, weight, bias = (
        torch.randn(size, dtype=torch.float64, requires_grad=needed)
        for size, needed in zip(((3, 5), (4, 5), (4,)), requires, strict=True)
    )
    row_std, key = torch.rand(4, dtype=torch.float64), torch.tensor([5, 6])
    settings = (row_std, key, torch.tensor([0, 2]), torch.float64, "reference")
    torch.library.opcheck(torch.ops.flatlora.perturbed_linear.default, (x, weight, bias, *settings))
    grad = torch.randn(3, 4, dtype=torch.float64, requires_grad=requires[0])
    torch.library.opcheck(torch.ops.flatlora.perturbed_linear_grad_x.default, (grad, weight, *settings))


def test_the_noise_operator_passes_opcheck():
    flat = model()
    layer = flat.base_model.model.layers[0]
    with perturbed(flat, sample=3):
        torch.library.opcheck(torch.ops.flatlora.layer_noise.default, (layer.base_layer.weight.detach(), layer.address))


def test_the_operator_is_differentiable_twice():
    row_std, key = torch.rand(4, dtype=torch.float64), torch.tensor([5, 6])
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def product(x, weight):
        return torch.ops.flatlora.perturbed_linear(
            x, weight, None, row_std, key, torch.tensor([0, 0]), x.dtype, "reference"
        )

    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(product, (x, weight))
    assert torch.autograd.gradgradcheck(product, (x, weight))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, of an input that is no leaf
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("region", ["whole", "blocks"])
def test_a_forward_between_a_checkpointed_forward_and_its_backward(region, backend):
    """What compiled code recomputes has the noise of its own forward."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        flat = model(checkpointed=True)
        run = flat
        if compiled and region == "whole":
            run = torch.compile(flat, backend=backend)
        elif compiled:
            for layer in flat.base_model.model.layers:
                layer.compile(backend=backend)
        state = perturbation(flat)
        state.progress = 1.0
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        run(x).square().mean().backward()  # so that the next forward takes another sample
        flat.zero_grad()
        first = run(x).square().mean()
        for _ in range(2):
            run(x + 1).square().mean().backward()
        flat.zero_grad()
        first.backward()
        results.append([first.detach(), *(p.grad for p in tiny.trainable(flat))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, of an input that is no leaf
@pytest.mark.parametrize("fullgraph", [False, True])
def test_equal_blocks_share_one_graph(fullgraph):
    """Regional compilation: a layer's number and stream are no constants of its graph."""
    blocks = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh()) for _ in range(12)])
    config = FlatLoraConfig(target_modules=[f"{i}.0" for i in range(12)], rho=0.2, schedule="constant", seed=3)
    flat = get_flat_peft_model(blocks, config).train()
    x = torch.randn(4, 16)
    eager = flat(x).detach()
    counter = CompileCounterWithBackend("eager")
    for block in blocks:
        block.compile(backend=counter, fullgraph=fullgraph)
    torch.testing.assert_close(flat(x), eager, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2  # as plain LoRA: the first input needs no gradient, the others do


def test_parts_that_were_joined_have_the_streams_of_the_eager_run_when_they_are_compiled():
    torch.manual_seed(0)
    config = FlatLoraConfig(target_modules=["0"], rho=0.2, schedule="constant", seed=3)
    parts = [get_flat_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config) for _ in range(2)]
    whole, x = torch.nn.Sequential(*parts).train(), torch.randn(4, 16)
    with perturbed(whole, sample=0):  # joins the parts
        eager, compiled = whole(x), torch.compile(whole, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, eager)
    assert not torch.allclose(eager, whole.eval()(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("context", [perturbed, unperturbed])
def test_noise_that_is_switched_on_or_off_is_so_in_compiled_code(context, training):
    flat, x = model(schedule="constant").train(training), torch.randn(4, 16)
    with torch.no_grad():
        clean = flat.eval()(x)
        flat.train(training)
    with context(flat):
        eager, compiled = flat(x), torch.compile(flat, backend="eager")(x)
    torch.testing.assert_close(compiled, eager)
    assert torch.allclose(eager, clean) == (context is unperturbed)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_hooks_of_a_base_layer_run_in_compiled_code():
    flat, x = model(schedule="constant"), torch.randn(4, 16)
    flat.base_model.model.layers[1].base_layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    with perturbed(flat, sample=0):
        torch.testing.assert_close(torch.compile(flat, backend="eager")(x), flat(x))


def test_evaluation_is_clean_before_anything_was_switched():
    flat = model(schedule="constant").eval()
    compiled, x = torch.compile(flat, backend="aot_eager"), torch.randn(4, 16)
    with torch.no_grad():
        assert torch.equal(compiled(x), flat(x))
    assert perturbation(flat).sample == 0


@contextmanager
def in_another_thread(context):
    """Inside, another thread is in `context`."""
    entered, leave = threading.Event(), threading.Event()

    def stay():
        with context:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    entered.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's, at a graph break
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", [unperturbed, lambda m: perturbed(m, rho=0.7)], ids=["unperturbed", "perturbed"])
def test_a_context_of_another_thread_does_not_reach_compiled_code(context, training):
    flat = model(schedule="constant").train(training)
    compiled, x = torch.compile(flat, backend="aot_eager"), torch.randn(4, 16)
    with torch.set_grad_enabled(training):
        expected = flat(x)
        torch.testing.assert_close(compiled(x), expected)
        with in_another_thread(context(flat)):
            torch.testing.assert_close(compiled(x), expected)
        for own in (unperturbed(flat), perturbed(flat, rho=0.7)):
            with own:
                with in_another_thread(context(flat)):
                    pass
                torch.testing.assert_close(compiled(x), flat(x))


def test_a_model_that_a_thread_has_made_which_has_ended():
    made = []
    thread = threading.Thread(target=lambda: made.append(model(schedule="constant")))
    thread.start()
    thread.join()
    (flat,), x = made, torch.randn(4, 16)
    compiled = torch.compile(flat, backend="aot_eager", fullgraph=True)
    for context in (unperturbed(flat), perturbed(flat, sample=3)):
        with context:
            torch.testing.assert_close(compiled(x), flat(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_step_of_a_warmup_and_the_steps_of_a_second_optimizer_count(compiled):
    """Compiled code reports no pass: that something trains is known from the backward."""
    flat = model()
    run = torch.compile(flat, backend="aot_eager") if compiled else flat
    first, second = (torch.optim.SGD(tiny.trainable(flat), lr=0.1) for _ in range(2))
    warmup = torch.optim.lr_scheduler.LambdaLR(first, lambda step: min(1.0, step / 2))
    for step in range(6):
        optimizer = first if step < 3 else second
        run(torch.ones(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer is first:
            warmup.step()
        assert perturbation(flat).steps == step + 1
