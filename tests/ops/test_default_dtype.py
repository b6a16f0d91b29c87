"""The default dtype and the default device of the process change no bit."""

import pytest
import torch
from helpers.noise_cases import DEFAULTS, problem

from flatlora.ops import (
    RowNoise,
    add_noise_,
    lora_linear,
    merged_row_norms,
    native,
    perturb_weight,
    perturbed_conv,
    perturbed_linear,
    rebuilt_linear,
    row_noise,
    row_norms_of_sum,
    squared_row_norms,
)
from flatlora.ops.ascent import full_weight_ascent
from flatlora.ops.norms import grouped_row_norms, row_norms

BACKENDS = ["reference", "torch", *(["c"] if native.LIBRARY is not None else [])]


def every_operator(dtype, backend):
    """Results and gradients of all public operators."""
    weight, B, A, x, std, key = problem(dtype)
    squared = squared_row_norms(weight)
    yield squared
    yield row_norms(weight)
    yield merged_row_norms(weight, squared, B, A, 0.7)
    yield row_norms_of_sum(squared, (A @ weight.to(A.dtype).T), B, A, 0.7)
    yield grouped_row_norms(weight, squared, [B], [torch.cat([A, A, A], dim=0).repeat(1, 2)[:6]], 2)
    yield perturb_weight(weight, std, key, 3, 7, backend=backend)
    yield perturb_weight(weight, std, key, 3, 7, backend=backend, relative=0.3, dtype=torch.bfloat16)
    yield row_noise(torch.tensor([5, 0, 99], dtype=torch.int64, device="cpu"), std[:3], key, 1, 70, backend=backend)
    yield add_noise_(weight.clone(), std, key, 2, backend=backend)
    yield full_weight_ascent(A, B, A.cos(), B.cos(), scaling=0.5, rho=0.1)

    leaves = [x, A, B]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    x, A, B = leaves
    noise = RowNoise(std, 0.1, key, 4)
    geometry = {"stride": (1,), "padding": (1,), "dilation": (1,), "groups": 2, "backend": backend}
    kernels, image = weight[:, :69].reshape(130, 23, 3), x[:, :46].unsqueeze(-1).expand(4, 46, 5)
    for out in (
        lora_linear(x, weight, None, A, B, 0.7, noise, backend=backend),
        perturbed_linear(x, weight, None, std, key, 3, backend=backend),
        rebuilt_linear(x, weight, None, std, key, 3, backend=backend),
        perturbed_conv(image, kernels, None, std, key, 3, **geometry),
    ):
        yield out
        yield from (
            g for g in torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True) if g is not None
        )
    if native.has_norms(weight):
        norms = torch.full((130,), float("nan"), dtype=torch.float32, device="cpu")
        yield lora_linear(x, weight, None, A, B, 0.7, noise._replace(norms=norms, stale=True), backend="c")
        yield norms
        for kernel in range(native.BEST + 1):
            yield native.merged_row_norms(weight, B.detach(), A.detach(), 0.7, kernel=kernel)
    if native.LIBRARY is not None:
        rows = torch.tensor([1, 2], dtype=torch.int64, device="cpu")
        words = native.words(rows, 70, key, 1)
        yield words
        yield native.normals(words.flatten(0, 1))


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_changes_no_bit(dtype, backend, default):
    expected = list(every_operator(dtype, backend))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        got = list(every_operator(dtype, backend))
    finally:
        torch.set_default_dtype(before)
    assert len(got) == len(expected) >= 20
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), k


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_device_changes_no_bit(backend):
    expected = list(every_operator(torch.float32, backend))
    with torch.device("meta"):
        got = list(every_operator(torch.float32, backend))
    assert all(a.device.type == "cpu" and torch.equal(a, b) for a, b in zip(got, expected, strict=True))
