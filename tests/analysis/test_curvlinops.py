"""curvlinops takes our operator, where it is installed (`Hessian.to_curvlinops` says how without torchvision)."""

import statistics
import warnings

import pytest
import torch
from helpers.landscapes import Quadratic, value

from flatlora.analysis import Hessian

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # linear_operator scripts a function when it is imported
    curvlinops = pytest.importorskip("curvlinops")


def test_curvlinops_takes_the_operator():
    model = Quadratic()
    operator = Hessian(model, value, model.batches).to_curvlinops()
    torch.testing.assert_close(operator @ torch.eye(12, dtype=torch.float64), model.H)
    torch.testing.assert_close(operator.adjoint() @ model.w0.flatten(), model.H @ model.w0.flatten())
    torch.manual_seed(0)
    found = [curvlinops.hutchinson_trace(operator, num_matvecs=11).item() for _ in range(50)]
    assert abs(statistics.mean(found) - model.H.trace()) < 5 * statistics.stdev(found) / 50**0.5
