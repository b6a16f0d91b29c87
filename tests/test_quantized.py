"""Quantized layers of packages that need a GPU, on stand-ins with the same interface.

Their output is what peft computes, plus x eps^T.
"""

from helpers.quantized_cases import STAND_INS
from helpers.quantized_tests import QuantizedLayerTests


class TestStandIns(QuantizedLayerTests):
    cases = STAND_INS
