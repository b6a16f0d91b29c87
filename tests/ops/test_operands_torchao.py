"""A tensor subclass that calls itself float32 and keeps int8 elsewhere never reaches the kernel."""

import pytest
import torch
from helpers.noise import noise_key

from flatlora.ops import merged_row_norms, native, perturb_weight

torchao = pytest.importorskip("torchao.quantization")


@pytest.mark.skipif(native.LIBRARY is None, reason="the C kernel was not built")
def test_a_quantized_weight_is_refused_and_not_read():
    layer = torch.nn.Linear(64, 64)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    weight = layer.weight
    assert weight.dtype == torch.float32 and not native.has_norms(weight)
    with pytest.raises(TypeError, match="weight must be a plain strided tensor"):
        perturb_weight(weight, torch.ones(64), noise_key(0), 0, backend="c")
    with pytest.raises(ValueError, match="squared must be"):
        merged_row_norms(weight, None, torch.ones(64, 2), torch.ones(2, 64))
