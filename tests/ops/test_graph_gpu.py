"""Training steps in a CUDA graph, and kernels that no host waits for. Without a GPU: `test_merged_triton.py`."""

import pytest
import torch
from helpers import tiny

from flatlora import perturbation
from flatlora.ops import merged_row_norms, perturb_weight, squared_row_norms

triton_kernel = pytest.importorskip("flatlora.ops.triton_kernel")
pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture
def no_waiting():
    """A synchronization with the host is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def step(model, x):
    loss = model(input_ids=x, labels=x, use_cache=False).loss
    loss.backward()
    return loss


def trained(steps, graph):
    """The factors after some steps; with `graph`, all but the first three replay a graph."""
    model = tiny.flat_model(schedule="cosine", total_steps=steps).to(DEVICE)
    optimizer = torch.optim.SGD(tiny.trainable(model), lr=0.1)
    x, noise = tiny.tokens().to(DEVICE), perturbation(model)
    captured = torch.cuda.CUDAGraph()
    for k in range(steps):
        if not graph or k < 3:
            step(model, x)
        else:
            if k == 3:
                noise.graph.prepare(DEVICE)
                noise.graph.update()
                with torch.cuda.graph(captured):
                    step(model, x)
            else:
                noise.graph.update()
            captured.replay()
        optimizer.step()
        optimizer.zero_grad(set_to_none=k < 3)
    assert noise.steps == steps
    return [p.detach().clone() for p in tiny.trainable(model)]


def test_a_captured_run_is_the_run_of_eager_steps():
    torch.testing.assert_close(trained(8, True), trained(8, False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_step_waits_for_the_gpu(no_waiting, checkpointing):
    torch.cuda.set_sync_debug_mode("default")
    model = tiny.flat_model(schedule="cosine", total_steps=10).to(DEVICE)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    x = tiny.tokens().to(DEVICE)
    step(model, x)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        model(input_ids=x, use_cache=False).logits.float().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m, n, r", [(33, 257, 4), (1024, 2048, 16), (1024, 2048, 100)])
def test_norms_and_noise_have_the_same_bits_in_all_block_sizes(m, n, r, dtype, monkeypatch):
    weight = torch.randn(m, n, device=DEVICE).to(dtype)
    factors = torch.randn(m, r, device=DEVICE) / 8, torch.randn(r, n, device=DEVICE), 0.5
    key, results = torch.tensor([5, 6], device=DEVICE), []
    for size in triton_kernel.MERGED:
        monkeypatch.setattr(triton_kernel, "MERGED", (size,))
        norms = torch.empty(m, device=DEVICE)
        results.append(
            (norms, perturb_weight(weight, norms, key, 3, dtype=torch.float32, relative=0.1, factors=factors))
        )
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    expected = (weight.double() + 0.5 * factors[0].double() @ factors[1].double()).norm(dim=1)
    torch.testing.assert_close(results[0][0].double(), expected, rtol=1e-6, atol=0)
    formula = merged_row_norms(weight, squared_row_norms(weight), factors[0], factors[1], 0.5)
    torch.testing.assert_close(results[0][0], formula, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=0)
