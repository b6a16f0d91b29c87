"""4-bit and 8-bit layers of bitsandbytes."""

import pytest
import torch
from helpers.internals import row_norms
from helpers.memory import allocations
from helpers.quantized_cases import BITSANDBYTES, SETTINGS, Holder, N, flat_model
from helpers.quantized_tests import QuantizedLayerTests, clean, merged_weight, only

import flatlora.ops.blocks
from flatlora import FlatLoraConfig, get_flat_peft_model

bnb = pytest.importorskip("bitsandbytes")


class TestBitsandbytes(QuantizedLayerTests):
    cases = BITSANDBYTES

    @only(lambda case: case.name in ("nf4-double", "int8"))
    def test_merging_writes_the_weight_and_drops_its_norms(self, case):
        """peft quantizes the merged weight: after merge and unmerge the weight is another one."""
        model, layer = flat_model(case)
        x = torch.randn(3, N)
        model(x)
        before = row_norms(layer)
        model.base_model.merge_adapter()
        assert torch.equal(model(x), clean(model, x))
        model.base_model.unmerge_adapter()
        model(x)
        torch.testing.assert_close(row_norms(layer), merged_weight(model, layer).norm(dim=1), rtol=2e-5, atol=0)
        assert not torch.equal(row_norms(layer), before)
        merged = model.merge_and_unload()
        assert type(merged.layer).__module__.startswith("bitsandbytes.") and not merged._forward_hooks


def test_a_four_bit_weight_is_dequantized_a_block_at_a_time(monkeypatch):
    """A weight of 4 MiB in float32, blocks of 64 KiB, scales in 8 bits: no temporary is much larger than a block."""
    monkeypatch.setattr(flatlora.ops.blocks, "BLOCK_BYTES", 2**16)
    holder = Holder(bnb.nn.Linear4bit(256, 4096, bias=False, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    holder.is_loaded_in_4bit = True
    model = get_flat_peft_model(holder, FlatLoraConfig(**SETTINGS | {"r": 2}, schedule="constant")).train()
    x = torch.randn(2, 256, requires_grad=True)
    largest, peak = allocations(lambda: model(x).sum().backward())
    assert largest <= 2**16
    assert peak <= 2**19
