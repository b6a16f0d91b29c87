"""The methods that use gradients under DeepSpeed's ZeRO-2 and ZeRO-3."""

import pytest
from helpers import processes
from helpers.method_runs import ascend_without_the_engine, skip_a_step, step_in_half
from helpers.method_tests import MethodTests

pytest.importorskip("deepspeed")
pytestmark = [processes.patient, pytest.mark.slow]
each_stage = pytest.mark.parametrize("stage", ["zero2", "zero3"])


class TestMethods(MethodTests):
    engines = ("zero2", "zero3")


def read(parameter):
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    return safe_get_full_fp32_param(parameter).clone(), safe_get_full_grad(parameter).float().clone()


@each_stage
def test_a_half_precision_forward_has_float32_offsets(stage):
    processes.run(step_in_half, stage, read)


@each_stage
def test_a_step_that_deepspeed_skips_changes_nothing(stage):
    processes.run(skip_a_step, stage)


def test_the_first_pass_asks_for_the_engine():
    processes.run(ascend_without_the_engine, "zero2")
