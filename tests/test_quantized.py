"""Quantized layers of packages that need a GPU, on stand-ins with the same interface.

What peft computes, plus x eps^T with eps relative to the rows of the dequantized merged weight.
"""

from helpers.quantized_cases import STAND_INS
from helpers.quantized_tests import QuantizedLayerTests


class TestStandIns(QuantizedLayerTests):
    cases = STAND_INS
