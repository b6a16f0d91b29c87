"""4-bit models of bitsandbytes under ZeRO-3."""

import pytest
from helpers.engine_tests import KindTests

pytest.importorskip("bitsandbytes")
pytest.importorskip("deepspeed")


class TestFourBit(KindTests):
    engines = ("zero3",)
    four_bit = True
