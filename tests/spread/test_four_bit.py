"""4-bit models of bitsandbytes under DDP, FSDP2 and FSDP1."""

import pytest
from helpers.engine_tests import KindTests

pytest.importorskip("bitsandbytes")


class TestFourBit(KindTests):
    engines = ("ddp", "fsdp2", "fsdp1")
    four_bit = True
