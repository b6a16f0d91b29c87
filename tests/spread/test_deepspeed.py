"""DeepSpeed's ZeRO-2 and ZeRO-3."""

import pytest
from helpers import processes
from helpers.engine_tests import EngineTests

pytest.importorskip("deepspeed")
pytestmark = processes.patient


class TestDeepspeed(EngineTests):
    engines = ("zero2", "zero3")
