"""Two linear layers with a function between them, adapted by any method."""

import functools

import peft
import torch
from torch import nn

from flatlora import BarConfig, BiLoraConfig, EFMLoraConfig, FlatLoraConfig, RwpConfig

KINDS = {
    "flat": functools.partial(FlatLoraConfig, seed=1),
    "rwp": functools.partial(RwpConfig, seed=1),
    "rwp-adapter": functools.partial(RwpConfig, space="adapter", seed=1),
    "efmlora": EFMLoraConfig,
    "bilora": BiLoraConfig,
    "bar": BarConfig,
}


class TwoLayers(nn.Module):
    def __init__(self, between=torch.tanh):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(6, 5), nn.Linear(5, 6), between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def adapted(config, model=TwoLayers, dtype=torch.float32, low=torch.float32, **settings):
    """The adapted model. It is the same for every class of configuration; B is random."""
    torch.manual_seed(0)
    model = model().to(dtype)
    settings = {"r": 2, "target_modules": ["first", "second"], **settings}
    model = peft.get_peft_model(model, config(**settings), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    for p in trainable(model):
        p.data = (0.3 * torch.randn(p.shape, generator=generator)).to(low)
    return model.train()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def flat(kind, rho=0.2, **options):
    return adapted(functools.partial(kind, rho=rho, schedule="constant"), **options)


def x_like(dtype=torch.float32):
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
