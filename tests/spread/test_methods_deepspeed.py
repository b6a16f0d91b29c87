"""The methods that use gradients under DeepSpeed's ZeRO-2 and ZeRO-3."""

import pytest
from helpers.method_tests import MethodTests

pytest.importorskip("deepspeed")


class TestMethods(MethodTests):
    engines = ("zero2", "zero3")
