"""torchao converts the base layer after the adapter was made: quantization-aware training, float8 and int8."""

import pytest
import torch
from helpers.changed_base import check_noise, check_without_strength
from torch import nn

pytest.importorskip("torchao")


def ours(module, name):
    return isinstance(module, nn.Linear) and "base_layer" in name


def qat(model):
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    fake = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(model, QATConfig(weight_config=fake, step="prepare"), filter_fn=ours)


def float8(model):
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(model, config=Float8LinearConfig(emulate=True), module_filter_fn=ours)


def int8(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=ours)


# the warning is dynamo's own, after a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("change", [qat, float8, int8], ids=lambda change: change.__name__)
def test_without_strength_the_forward_tends_to_plain_loras(change):
    check_without_strength(change)


def test_the_noise_under_quantization_aware_training_is_that_of_the_stored_weight():
    check_noise(qat)


def test_the_noise_on_integers_is_that_of_the_dequantized_weight():
    check_noise(int8, lambda weight: weight.dequantize())
