"""examples/distributed with DDP, FSDP2 and FSDP1, as two launchers start it."""

import pytest
from helpers.launch_tests import ENGINES, LaunchTests


class TestLaunch(LaunchTests):
    engines = [engine for engine in ENGINES if not engine.startswith("zero")]


class TestLaunchOfEFMLora(LaunchTests):
    engines, method = ("fsdp2",), "EFMLoraConfig"


@pytest.mark.thorough
class TestLaunchOfFMLora(LaunchTests):
    engines, method = ("fsdp2",), "FMLoraConfig"
