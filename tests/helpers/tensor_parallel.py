"""A tiny Llama whose weights are split over processes, by transformers or by torch, and the same one whole."""

import os
import zlib
from contextlib import contextmanager
from inspect import signature
from unittest import mock

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from flatlora import FlatLoraConfig, perturbation
from flatlora.layers import tensor_parallel
from flatlora.layers.flat_layer import FlatLayer
from helpers import tiny

BY_TRANSFORMERS = "tp_size" in signature(DistributedConfig).parameters  # transformers splits weights from 5.17 on
STEPS, ACCUMULATED = 3, 2
FLAT = {"rho": 0.3, "schedule": "linear", "total_steps": STEPS, "seed": 7}
COLUMN_WISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROW_WISE = ("self_attn.o_proj", "mlp.down_proj")


def save_base(folder):
    """A model with biases, and with 50 columns to split: neither part is a multiple of a tile."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2, "vocab_size": tiny.TOKENS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=True, mlp_bias=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)


def whole(folder, config=None, **options):
    return with_adapter(LlamaForCausalLM.from_pretrained(folder, **options), config)


def by_transformers(folder, config=None, **options):
    split = DistributedConfig(tp_size=dist.get_world_size())
    return with_adapter(LlamaForCausalLM.from_pretrained(folder, distributed_config=split, **options), config)


def by_torch(folder, mesh, config=None, **options):
    """The adapter is made first, and its factors are split with the weights."""
    model = whole(folder, config, **options)
    parallelize_module(model, mesh, plan())
    return model


def plan(prefix="base_model.model.model.layers.*."):
    styles = {}
    for names, style, factor in ((COLUMN_WISE, ColwiseParallel, "lora_B"), (ROW_WISE, RowwiseParallel, "lora_A")):
        for name in names:
            styles |= {f"{prefix}{name}.base_layer": style(), f"{prefix}{name}.{factor}.default": style()}
    return styles


def with_adapter(base, config=None):
    config = FlatLoraConfig(**FLAT, **tiny.LORA) if config is None else config
    model = peft.get_peft_model(base, config).train()
    set_factors(model)
    return model


def with_two_adapters(model):
    model.add_adapter("second", FlatLoraConfig(**FLAT, **tiny.LORA))
    model.base_model.set_adapter(["default", "second"])
    set_factors(model)
    return model


def gradients_of_a_pass(model):
    loss = tiny.loss(model)
    loss.backward()
    gradients = {name: as_whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **gradients}


@torch.no_grad()
def set_factors(model):
    """The same factors whether they are split or not."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            value = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def as_whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model, seed_of=lambda step, part: 2 * step + part):
    """Train some steps of two batches each, and return what the tests compare."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # not Adam, which divides small gradients by their own size, rounding errors included
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5, momentum=0.9, foreach=False)
    losses, gradients, sums, products = [], [], [], {}
    for step in range(STEPS):
        with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as reduced, recorded(products):
            for part in range(ACCUMULATED):
                loss = tiny.loss(model, seed=seed_of(step, part))
                (loss / ACCUMULATED).backward()
                losses.append(loss.detach())
        sums.append(reduced.call_count)
        gradients.append({name: as_whole(p.grad) for name, p in parameters.items()})
        optimizer.step()
        optimizer.zero_grad()
    run = perturbation(model)
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "parameters": {name: as_whole(p) for name, p in parameters.items()},
        "sums": sums,
        "noise": (run.rank, run.sample, run.rho_t, run.noise.mixed_seed()),
        "streams": {m.stream: name for name, m in model.named_modules() if isinstance(m, FlatLayer)},
        "products": products,
    }


@contextmanager
def recorded(found):
    """Keep the last product of each stream: its part of W, the index of its first element, and the key."""
    product = tensor_parallel.perturbed_linear

    def record(x, weight, bias, row_std, key, stream, *, first_row, first_column, **options):
        found[stream] = (weight.clone(), first_row, first_column, key.clone())
        where = {"first_row": first_row, "first_column": first_column}
        return product(x, weight, bias, row_std, key, stream, **where, **options)

    with mock.patch.object(tensor_parallel, "perturbed_linear", record):
        yield


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 50), nn.Linear(50, 32)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def blocks():
    torch.manual_seed(3)
    config = FlatLoraConfig(**{**FLAT, **tiny.LORA, "task_type": None, "target_modules": ["up", "down"]})
    return with_adapter(nn.Sequential(Block(), Block()), config)


def blocks_by_sequence(mesh):
    """Between the products each process has a part of the sequence, dimension 1."""
    model, part = blocks(), {"output_layouts": Shard(1)}
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True)
    styles = {
        "norm": SequenceParallel(),
        "up": gather,
        "up.base_layer": ColwiseParallel(),
        "up.lora_B.default": ColwiseParallel(),
        "down.base_layer": RowwiseParallel(**part),
        "down.lora_A.default": RowwiseParallel(use_local_output=False, **part),
        "down.lora_B.default": SequenceParallel(use_local_output=True),
    }
    parallelize_module(model, mesh, {f"base_model.model.*.{name}": style for name, style in styles.items()})
    for name, parameter in model.named_parameters():  # SequenceParallel makes new parameters
        parameter.requires_grad_("lora_" in name)
    return model


def gradients_of_blocks(model, part=slice(None)):
    """Of two passes, with other noise each: x has 6 positions, of which this process has a part."""
    found = []
    for seed in range(2):
        x, weight = torch.randn(2, 2, 6, 32, generator=torch.Generator().manual_seed(seed))
        out = model(x[:, part])
        (out.square() * weight[:, part]).sum().backward()
        found.append({name: as_whole(p.grad) for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    return found


def environment(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()))
