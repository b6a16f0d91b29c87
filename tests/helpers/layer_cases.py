"""The kinds of layers as data, and the dense weight W + sBA + eps that each is compared with."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from flatlora import FlatLoraConfig, get_flat_peft_model, perturbation
from helpers.noise import epsilon

RHO, SEED = 0.3, 11


@dataclass
class Case:
    name: str
    layer: Any  # a function that makes the layer
    shape: tuple[int, ...]  # shape of the input; integers below `tokens` if that is set
    tokens: int = 0
    config: dict = field(default_factory=dict)
    adapters: tuple[str, ...] = ("default",)


def linear(bias=True):
    return nn.Linear(10, 7, bias=bias)


CASES = [
    Case("linear", linear, (2, 3, 10)),
    Case("linear-nobias", lambda: linear(False), (3, 10)),
    Case("linear-vector", linear, (10,)),
    Case("linear-rslora", linear, (3, 10), config={"use_rslora": True}),
    Case("linear-patterns", linear, (3, 10), config={"rank_pattern": {"layer": 5}, "alpha_pattern": {"layer": 3}}),
    Case("linear-two-adapters", linear, (3, 10), adapters=("default", "second")),
    Case("conv1d-gpt2", lambda: Conv1D(7, 10), (2, 3, 10), config={"fan_in_fan_out": True}),
    Case("conv1d", lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    Case("conv2d", lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), (2, 4, 7, 6)),
    Case("conv2d-unbatched", lambda: nn.Conv2d(4, 8, 3), (4, 7, 6)),
    Case("conv2d-nobias-1x1", lambda: nn.Conv2d(4, 8, 1, bias=False), (2, 4, 5, 5)),
    Case("conv2d-groups", lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1), (2, 4, 5, 5)),
    Case("conv2d-depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2), (2, 4, 7, 7)),
    Case("conv2d-two-adapters", lambda: nn.Conv2d(4, 8, 3), (2, 4, 5, 5), adapters=("default", "second")),
    Case("conv3d", lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1)), (2, 2, 4, 4, 3)),
    Case("embedding", lambda: nn.Embedding(13, 10), (2, 5), tokens=13),
    Case("embedding-padding", lambda: nn.Embedding(13, 10, padding_idx=0), (2, 5), tokens=13),
    Case("embedding-two-adapters", lambda: nn.Embedding(13, 10), (2, 5), tokens=13, adapters=("default", "second")),
    Case("linear-dora", linear, (2, 3, 10), config={"use_dora": True}),
    Case("conv1d-gpt2-dora", lambda: Conv1D(7, 10), (3, 10), config={"use_dora": True, "fan_in_fan_out": True}),
    Case("conv2d-dora", lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 5, 5), config={"use_dora": True}),
    Case("embedding-dora", lambda: nn.Embedding(13, 10), (2, 5), tokens=13, config={"use_dora": True}),
]


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def flat_model(case, dtype=torch.float64, **config):
    """(peft model, its flat layer, an input). B and the magnitudes are random, so that no term is zero."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["layer"], "rho": RHO, "schedule": "constant", "seed": SEED}
    settings |= case.config | config
    holder = Holder(case.layer()).to(dtype)
    model = get_flat_peft_model(holder, FlatLoraConfig(**settings), autocast_adapter_dtype=False)
    for name in case.adapters[1:]:
        model.add_adapter(name, FlatLoraConfig(**settings | {"r": 8, "rank_pattern": {}}))
    model.base_model.set_adapter(list(case.adapters))
    layer = model.base_model.model.layer
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    x = torch.randint(case.tokens, case.shape) if case.tokens else torch.randn(case.shape, dtype=dtype)
    return model.train(), layer, x


def dense_weight(layer):
    """W + sBA of shape (out, ...), differentiable. Grouped convolutions are written out over all input channels."""
    base = layer.get_base_layer()
    weight = _ungroup(base.weight.T if isinstance(base, Conv1D) else base.weight, getattr(base, "groups", 1))
    return weight + sum(_delta(layer, base, name) for name in layer.active_adapters)


def _delta(layer, base, name):
    scaling = layer.scaling[name]
    if isinstance(base, nn.Embedding):
        return scaling * (layer.lora_embedding_B[name] @ layer.lora_embedding_A[name]).T
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    groups = getattr(base, "groups", 1)
    rank, rows = A.shape[0] // groups, B.shape[0] // groups
    parts = [B.flatten(1)[g * rows : (g + 1) * rows] @ A.flatten(1)[g * rank : (g + 1) * rank] for g in range(groups)]
    return scaling * torch.cat(parts).view(B.shape[0], *A.shape[1:])


def _ungroup(weight, groups):
    if groups == 1:
        return weight
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    full = weight.new_zeros(weight.shape[0], columns * groups, *weight.shape[2:])
    for g in range(groups):
        full[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = weight[g * rows : (g + 1) * rows]
    return full


def dense_noise(layer, sample=0, rho=RHO, seed=SEED):
    """eps in the layout of `dense_weight`."""
    base = layer.get_base_layer()
    own = base.weight.T if isinstance(base, Conv1D) else base.weight.flatten(1)
    eps = epsilon(own, layer.stream, rho=rho, norms=merged_norms(layer), seed=seed, sample=sample)
    shape = own.shape if isinstance(base, Conv1D) else base.weight.shape
    return _ungroup(eps.view(shape), getattr(base, "groups", 1))


def merged_norms(layer):
    """||W'_i||, of shape (m,). With DoRA they follow from the magnitudes."""
    dora = [name for name in layer.active_adapters if layer.use_dora.get(name)]
    weight = dense_weight(layer)
    if not dora:
        return weight.flatten(1).norm(dim=1)
    magnitude = layer.lora_magnitude_vector[dora[0]].weight
    if isinstance(layer.get_base_layer(), nn.Embedding):  # peft keeps one magnitude per column here
        return (weight * (magnitude / weight.norm(dim=0))).norm(dim=1)
    return magnitude.flatten().abs()


def apply_dense(layer, x, weight, bias):
    """Apply the layer's operation with a dense weight."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return F.embedding(x, weight)
    if isinstance(base, (nn.Linear, Conv1D)):
        return F.linear(x, weight, bias)
    conv = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}[type(base)]
    return conv(x, weight, bias, base.stride, base.padding, base.dilation)


def clean_forward(model, x):
    """The forward without noise."""
    perturbation(model).enabled = False
    try:
        return model(x)
    finally:
        perturbation(model).enabled = True
