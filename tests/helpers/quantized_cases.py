"""Quantized layers as data: those of three packages, and stand-ins for the packages that need a GPU.

A package is imported only when a layer of it is made.
"""

import importlib
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peft
import torch
import torch.nn.functional as F
import transformers.integrations.eetq
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatlora import FlatLoraConfig, attach, get_flat_peft_model
from helpers.layer_cases import RHO, SEED

M, N = 64, 128
SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["layer"]}
FLAT = {"rho": RHO, "schedule": "constant", "seed": SEED}


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.checkpointing = layer, None

    def forward(self, x):
        if self.checkpointing is None:
            return self.layer(x)
        return checkpoint(self.layer, x, use_reentrant=self.checkpointing)


class Packed(nn.Module):
    """What the layers of GPTQ, AWQ and AQLM have in common: integers, scales, and a forward of x alone."""

    def __init__(self):
        super().__init__()
        self.infeatures, self.outfeatures = N, M
        self.register_buffer("qweight", torch.randint(-8, 8, (M, N), dtype=torch.int8))
        self.register_buffer("scales", 0.02 + 0.01 * torch.rand(M, N // 16))
        self.register_buffer("offset", torch.randn(M))

    def forward(self, x):
        weight = self.qweight * self.scales.repeat_interleave(16, dim=1)
        return F.linear(x, weight.to(x.dtype), self.offset.to(x.dtype))


def four_bit(**kwargs):
    def make():
        import bitsandbytes as bnb

        holder = Holder(bnb.nn.Linear4bit(N, M, **{"compute_dtype": torch.float32, **kwargs})).to("cpu")
        holder.is_loaded_in_4bit = True
        return holder

    return make


def long_blocks():
    """A layer of bitsandbytes whose blocks span four rows."""
    import bitsandbytes as bnb

    holder = four_bit(quant_type="nf4")()
    weight = bnb.nn.Params4bit(torch.randn(M, N), requires_grad=False, blocksize=512, quant_type="nf4")
    holder.layer.weight = weight.to("cpu")
    return holder


def eight_bit():
    import bitsandbytes as bnb

    holder = Holder(bnb.nn.Linear8bitLt(N, M, has_fp16_weights=False)).to("cpu")
    holder.is_loaded_in_8bit = True
    return holder


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = Holder(nn.Linear(N, M))
    quantize_(holder, Int8WeightOnlyConfig())
    return holder


def hqq():
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return Holder(HQQLinear(nn.Linear(N, M).requires_grad_(False), config, compute_dtype=torch.float32, device="cpu"))


def packed():
    return Holder(Packed())


def as_if_installed(name, **packages):
    """Reload a module of peft that defines its layers only where a package is installed."""
    with (
        mock.patch.dict(sys.modules, packages),
        mock.patch(f"peft.import_utils.is_{name}_available", return_value=True),
    ):
        importlib.reload(importlib.import_module(f"peft.tuners.lora.{name}"))


as_if_installed("eetq", eetq=SimpleNamespace(EetqLinear=transformers.integrations.eetq.EetqLinear))
as_if_installed("inc")


def eetq():
    """transformers' layer: integers of shape (in, out) and a scale for each output; its kernel is a stand-in."""
    layer = transformers.integrations.eetq.EetqLinear(N, M, bias=True).requires_grad_(False)
    layer.in_features, layer.out_features = N, M
    layer.weight.copy_(torch.randint(-127, 128, (N, M)))
    layer.weight_scales.copy_(0.001 + 0.001 * torch.rand(M))
    layer.bias.copy_(torch.randn(M))
    return Holder(layer)


class Kernels:
    @staticmethod
    def w8_a16_gemm(x, weight, scales):
        return x @ (weight.to(x.dtype) * scales.to(x.dtype))


transformers.integrations.eetq.eetq_kernels_hub = Kernels


class PatchedLinear(nn.Module):
    """As in Intel Neural Compressor, under the name that peft asks for: the weight in 8-bit floats, of shape (in, out),
    x rounded to such numbers too, both with a scale."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = N, M
        self.weight = nn.Parameter(torch.randn(N, M).to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(M), requires_grad=False)

    def dequant_weights(self, weight):
        return weight.float() / 64

    def quant_input(self, x):
        rounded = (x * 64).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) / 64
        return x + (rounded - x).detach()

    def forward(self, x):
        return self.quant_input(x) @ self.dequant_weights(self.weight) + self.bias


INC = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"
sys.modules[INC] = SimpleNamespace(PatchedLinear=PatchedLinear)  # where peft imports it from


def eight_bit_floats():
    return Holder(PatchedLinear())


@dataclass
class Case:
    name: str
    make: Any
    package: str | None = None  # the package of the layer; None for a stand-in
    wrapper: Any = None  # peft's layer, where peft finds it only with the package of its base layer
    config: dict = field(default_factory=dict)
    tolerance: float = 2e-5

    @property
    def made_by_peft(self):
        """peft chooses the class of the LoRA layer by itself."""
        return self.wrapper is None


BITSANDBYTES = [
    Case("nf4", four_bit(quant_type="nf4", compress_statistics=False)),
    Case("nf4-double", four_bit(quant_type="nf4")),
    Case("nf4-long", long_blocks),
    Case("fp4-nobias", four_bit(bias=False)),
    Case("nf4-storage", four_bit(quant_type="nf4", quant_storage=torch.bfloat16)),
    Case("nf4-bf16", four_bit(quant_type="nf4", compute_dtype=torch.bfloat16), tolerance=0.03),
    Case("nf4-unset", four_bit(quant_type="nf4", compute_dtype=None)),
    Case("nf4-dora", four_bit(quant_type="nf4"), config={"use_dora": True}),
    Case("int8", eight_bit),
]
TORCHAO = [Case("torchao", torchao)]
HQQ = [Case("hqq", hqq), Case("hqq-dora", hqq, config={"use_dora": True})]
STAND_INS = [
    Case("gptq", packed, wrapper=GPTQLoraLinear),
    Case("gptq-qalora", packed, wrapper=GPTQLoraLinear, config={"use_qalora": True, "qalora_group_size": 16}),
    Case("awq", packed, wrapper=AwqLoraLinear),
    Case("aqlm", packed, wrapper=AqlmLoraLinear),
    Case("eetq", eetq),
    Case("inc", eight_bit_floats),
]
for package, cases in {"bitsandbytes": BITSANDBYTES, "torchao": TORCHAO, "hqq": HQQ}.items():
    for case in cases:
        case.package = package
CASES = [*BITSANDBYTES, *TORCHAO, *HQQ, *STAND_INS]


def flat_model(case, **config):
    """(model, its layer). The factors are random, so that no term is zero."""
    torch.manual_seed(1)
    holder = case.make()
    settings = SETTINGS | case.config | config
    if case.wrapper is not None:
        plain = peft.LoraConfig(**{name: value for name, value in settings.items() if name not in FLAT})
        sizes = {"r": plain.r, "lora_alpha": plain.lora_alpha}
        holder.layer = case.wrapper(holder.layer, "default", config=plain, **sizes)
        model = attach(holder, **FLAT | {name: value for name, value in config.items() if name in FLAT})
        layer = model.layer
    else:
        model = get_flat_peft_model(holder, FlatLoraConfig(**FLAT | settings))
        layer = model.base_model.model.layer
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
            elif "magnitude" in name:
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=generator))
    return model.train(), layer
