"""Layers that peft merges as a whole, as data: attention, and experts in both layouts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from flatlora import FlatLoraConfig, get_flat_peft_model
from helpers.layer_cases import RHO, SEED
from helpers.noise import epsilon

DIM, EXPERTS, HIDDEN = 8, 3, 10
FLAT = {"rho": RHO, "schedule": "constant", "seed": SEED}


class Holder(nn.Module):
    """A model of one block; `call` is how it is called."""

    def __init__(self, block):
        super().__init__()
        self.block, self.checkpointing = block, None

    def call(self, x):
        return self.block(x)

    def forward(self, x):
        if self.checkpointing is None:
            return self.call(x)
        return checkpoint(self.call, x, use_reentrant=self.checkpointing)


class Attention(Holder):
    def __init__(self):
        super().__init__(nn.MultiheadAttention(DIM, 2, batch_first=True))

    def call(self, x):
        return self.block(x, x, x, need_weights=False)[0]


class Moe(nn.Module):
    """Experts stored as (experts, out, in), or as (experts, in, out) where `is_transposed` says so, as transformers
    does; and a gate, which is one matrix."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (DIM, HIDDEN), (HIDDEN, DIM)
        self.up = nn.Parameter(torch.randn(EXPERTS, *(up if is_transposed else up[::-1])))
        self.down = nn.Parameter(torch.randn(EXPERTS, *(down if is_transposed else down[::-1])))
        self.gate = nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, x):
        up, down = (self.up.mT, self.down.mT) if self.is_transposed else (self.up, self.down)
        parts = [F.linear(F.linear(x, up[e]).tanh(), down[e]) for e in range(EXPERTS)]
        share = F.linear(x, self.gate).softmax(dim=-1)
        return (torch.stack(parts, dim=-1) * share[..., None, :]).sum(dim=-1)


def noise(layer, weight, transposed=False, sample=0):
    """eps in the layout of the weight: the rows are the outputs, numbered through all experts."""
    weight = weight.detach()
    rows = (weight.mT if transposed else weight).reshape(-1, weight.shape[-2 if transposed else -1])
    eps = epsilon(rows, layer.stream, rho=RHO, seed=SEED, sample=sample)
    return eps.view(weight.mT.shape).mT if transposed else eps.view(weight.shape)


def wrappers(model):
    """The nested LoRA layers of the experts, by the name of their parameter."""
    layer, found = model.base_model.model.block, {}
    while hasattr(layer, "parameter_name"):
        found[layer.parameter_name], layer = layer, layer.base_layer
    return found


def dense_experts(model, x, noisy=True, adapters=("default",)):
    layers = wrappers(model)
    base = model.base_model.model.block.get_base_layer()
    weights = {k: layer.get_param() + sum(map(layer.get_delta_weight, adapters)) for k, layer in layers.items()}
    if noisy:
        weights = {k: w + noise(layers[k], w, w.ndim == 3 and base.is_transposed) for k, w in weights.items()}
    return functional_call(Moe(base.is_transposed).to(x.dtype), weights, (x,))


def parts(attention):
    """(frozen weight, flat layer) of in_proj and of out_proj."""
    out_proj = attention.base_layer.out_proj
    return [(attention.base_layer.in_proj_weight, attention), (out_proj.base_layer.weight, out_proj)]


def merged_weights(attention):
    """W' of in_proj and out_proj with the graph of A and B. peft counts out_proj's sBA twice in the value (it merges by
    hand and then calls merge) and once in the gradient; merged adapters do, too, so that is the model there is."""
    first, second = (weight + layer.get_delta_weight("default") for weight, layer in parts(attention))
    return first, second + parts(attention)[1][1].get_delta_weight("default").detach()


def attend(attention, x, first, second):
    base = attention.base_layer
    bias = {"in_proj_bias": base.in_proj_bias, "out_proj.bias": base.out_proj.base_layer.bias}
    stock = nn.MultiheadAttention(DIM, 2, batch_first=True).to(x.dtype)
    return functional_call(stock, {"in_proj_weight": first, "out_proj.weight": second, **bias}, (x, x, x))[0]


def dense_attention(model, x, noisy=True):
    attention = model.base_model.model.block
    weights = merged_weights(attention)
    if noisy:
        weights = [w + noise(layer, w) for w, (_, layer) in zip(weights, parts(attention), strict=True)]
    return attend(attention, x, *weights)


@dataclass
class Case:
    name: str
    holder: Callable[[], Any]
    config: dict
    shape: tuple[int, ...]  # shape of the input
    dense: Callable[..., Any]  # (model, x, noisy=True): the dense expression
    block: int  # elements of the largest matrix that gets noise


ATTENTION = Case("attention", Attention, {"target_modules": ["block"]}, (2, 5, DIM), dense_attention, 4 * DIM * DIM)
PARAMETERS = {"target_parameters": ["block.up", "block.down", "block.gate"]}
OUT_IN, IN_OUT = (
    Case(name, lambda order=order: Holder(Moe(order)), PARAMETERS, (5, DIM), dense_experts, DIM * HIDDEN)
    for name, order in (("experts-out-in", False), ("experts-in-out", True))
)
every_case = pytest.mark.parametrize("case", [ATTENTION, OUT_IN, IN_OUT], ids=lambda case: case.name)
both_layouts = pytest.mark.parametrize("case", [OUT_IN, IN_OUT], ids=lambda case: case.name)


def settings_of(case):
    return {"r": 4, "lora_alpha": 8, **case.config}


def randomize(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model.train()


def flat_model(case, kind=FlatLoraConfig, dtype=torch.float64, **config):
    torch.manual_seed(1)
    config = kind(**settings_of(case) | (FLAT if kind is FlatLoraConfig else {"schedule": "constant"}) | config)
    return randomize(get_flat_peft_model(case.holder().to(dtype), config, autocast_adapter_dtype=False))


def plain_model(case):
    torch.manual_seed(1)
    config = peft.LoraConfig(**settings_of(case))
    return randomize(peft.get_peft_model(case.holder().double(), config, autocast_adapter_dtype=False))


def input_of(case, seed=0, dtype=torch.float64):
    return torch.randn(case.shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def assert_close(first, second, tolerance=1e-10):
    for a, b in zip(first, second, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max())
