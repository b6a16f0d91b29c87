"""A small float64 network, as a peft model and as plain tensors that follow the papers step by step."""

import peft
import torch
from torch import nn

SIZES = [(6, 9), (9, 9), (9, 5)]
SCALING, R = 2.0, 3


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(n, m, bias=False) for n, m in SIZES])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def adapted(config, zero_B=False, **settings):
    """The network with adapters of the class `config`. The base and the factors are the same each time."""
    torch.manual_seed(0)
    base = Network().double()
    options = {"r": R, "lora_alpha": SCALING * R, "target_modules": ["0", "1", "2"], **settings}
    model = peft.get_peft_model(base, config(**options), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name and not (zero_B and "lora_B" in name):
            p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model.train()


def factors(model):
    """[(W, A, B)], detached copies."""
    return [
        (
            layer.base_layer.weight.detach().clone(),
            layer.lora_A["default"].weight.detach().clone().requires_grad_(),
            layer.lora_B["default"].weight.detach().clone().requires_grad_(),
        )
        for layer in model.base_model.model.layers
    ]


def batch(step, size=8):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(size, SIZES[0][0], generator=generator, dtype=torch.float64)
    return x, torch.randn(size, SIZES[-1][1], generator=generator, dtype=torch.float64)


def loss(model, step):
    x, y = batch(step)
    return (model(x) - y).square().mean()


def dense_loss(weights, step):
    x, y = batch(step)
    for W in weights:
        x = torch.tanh(x @ W.T)
    return (x - y).square().mean()


def leaves(tensors):
    return [p for _, A, B in tensors for p in (A, B)]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def dense_ascent(A, B, grad_A, grad_B, rho, s=SCALING, rtol=1e-7):
    """E_B by the formulas of arXiv 2508.00522 (eqs. 12, 13, 15), with pseudo-inverses and the full G."""
    pinv = torch.linalg.pinv
    G = 0.5 / s * (grad_B @ pinv(A.T, rtol=rtol) + pinv(B.T, rtol=rtol) @ grad_A)
    E_W = rho * G / torch.linalg.matrix_norm(G)
    return E_W @ pinv(A, rtol=rtol) / s


def assert_close(model, tensors, tolerance=1e-9):
    for p, q in zip(trainable(model), leaves(tensors), strict=True):
        assert (p - q).abs().max() <= tolerance * q.abs().max()
