"""Quantized layers of HQQ."""

import pytest
from helpers.quantized_cases import HQQ
from helpers.quantized_tests import QuantizedLayerTests

pytest.importorskip("hqq")


class TestHqq(QuantizedLayerTests):
    cases = HQQ
