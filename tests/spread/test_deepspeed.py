"""DeepSpeed's ZeRO-2 and ZeRO-3."""

import pytest
from helpers import processes
from helpers.engine_runs import step_with_whole_gradients
from helpers.engine_tests import EngineTests

pytest.importorskip("deepspeed")
pytestmark = processes.patient


class TestDeepspeed(EngineTests):
    engines = ("zero2", "zero3")


@pytest.mark.slow
def test_methods_that_need_whole_gradients_refuse_shards():
    processes.run(step_with_whole_gradients, TestDeepspeed.engines)
