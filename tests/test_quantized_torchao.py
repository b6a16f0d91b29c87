"""Quantized layers of torchao."""

import pytest
from helpers.quantized_cases import TORCHAO
from helpers.quantized_tests import QuantizedLayerTests

pytest.importorskip("torchao")


class TestTorchao(QuantizedLayerTests):
    cases = TORCHAO
