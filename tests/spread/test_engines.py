"""DDP, FSDP2, HSDP and FSDP1."""

from helpers.engine_tests import EngineTests


class TestEngines(EngineTests):
    engines = ("ddp", "fsdp2", "hsdp", "fsdp1", "fsdp1-flat")
