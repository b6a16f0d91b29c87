"""Quantized layers of packages that need a GPU, on stand-ins with the same interface.

Their output is what peft computes, plus x eps^T.
"""

import pytest
import torch
from helpers.quantized_cases import STAND_INS, N, flat_model
from helpers.quantized_tests import QuantizedLayerTests


class TestStandIns(QuantizedLayerTests):
    cases = STAND_INS


def test_a_kernel_that_takes_half_precision_only_is_asked_for_its_norms_in_it(monkeypatch):
    """Kernels of GPTQ and AWQ refuse float32, in which the row norms are summed."""
    (case,) = (case for case in STAND_INS if case.name == "gptq")
    model, layer = flat_model(case)
    whole = type(layer.base_layer).forward

    def half_only(self, x):
        if x.dtype != torch.bfloat16:
            raise TypeError(f"the kernel takes bfloat16, got {x.dtype}")
        return whole(self, x)

    monkeypatch.setattr(type(layer.base_layer), "forward", half_only)
    model(torch.randn(3, N, dtype=torch.bfloat16))
    norms = layer.row_norms()
    monkeypatch.undo()
    base = layer.base_layer
    dense = base.qweight * base.scales.repeat_interleave(16, dim=1)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged = dense + layer.scaling["default"] * B @ A
    assert norms.dtype == torch.float32
    assert norms == pytest.approx(merged.norm(dim=1).detach(), rel=0.02)
