"""The Triton backend on a GPU. Where there is none, `test_noise_triton.py` runs the kernel in Triton's interpreter."""

import pytest
import torch
from helpers import tiny
from helpers.noise_cases import DTYPES, STREAMS, assert_close, definition, key_of, random_case

from flatlora.ops import perturb_weight

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed, sample, layer, first_row, m, n", STREAMS)
def test_the_noise_is_that_of_the_definition(seed, sample, layer, first_row, m, n, dtype):
    weight, row_std = random_case(m, n, dtype)
    key = key_of(seed, sample).to(DEVICE)
    out = perturb_weight(weight.to(DEVICE), row_std.to(DEVICE), key, layer, first_row, backend="triton")
    assert_close(out.cpu(), definition(weight, row_std, seed, sample, layer, first_row))


def test_a_model_has_the_noise_that_it_has_on_the_cpu():
    models = tiny.flat_model(), tiny.flat_model().to(DEVICE)
    losses = []
    for model in models:
        x = tiny.tokens().to(model.device)
        losses.append(model(input_ids=x, labels=x).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-4, atol=1e-4)
    for on_cpu, on_gpu in zip(*map(tiny.gradients, models), strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-4)
