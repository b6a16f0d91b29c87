"""examples/distributed with DeepSpeed, as two launchers start it."""

import pytest
from helpers.launch_tests import ENGINES, LaunchTests

pytest.importorskip("deepspeed")


class TestLaunch(LaunchTests):
    engines = [engine for engine in ENGINES if engine.startswith("zero")]


@pytest.mark.thorough
class TestLaunchOfEFMLora(LaunchTests):
    engines, method = ("zero2", "zero3"), "EFMLoraConfig"


@pytest.mark.thorough
class TestLaunchOfFMLora(LaunchTests):
    engines, method = ("zero2", "zero3"), "FMLoraConfig"
