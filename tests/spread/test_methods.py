"""The methods that use gradients under FSDP2 and HSDP."""

from helpers.method_tests import MethodTests


class TestMethods(MethodTests):
    engines = ("fsdp2", "hsdp-1x2", "hsdp-2x1", "hsdp")
