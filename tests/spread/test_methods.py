"""The methods that use gradients under FSDP2 and HSDP."""

import pytest
from helpers import processes
from helpers.method_runs import step_in_half
from helpers.method_tests import MethodTests


class TestMethods(MethodTests):
    engines = ("fsdp2",)


@pytest.mark.thorough
class TestMethodsUnderHsdp(MethodTests):
    engines = ("hsdp-1x2", "hsdp-2x1", "hsdp")


def read(parameter):
    return parameter.detach().full_tensor(), parameter.grad.full_tensor()


@pytest.mark.slow
@processes.patient
def test_a_half_precision_forward_has_float32_offsets():
    processes.run(step_in_half, "fsdp2", read)
