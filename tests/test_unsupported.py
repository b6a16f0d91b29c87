"""A layer of peft that cannot be perturbed raises an error that names it and says why."""

import ast
import copy
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
from peft.tuners.lora.te import TeLinear
from peft.tuners.lora.tp_layer import LoraParallelLinear
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from flatlora import FlatLoraConfig, attach, get_flat_peft_model
from flatlora.layers.supported import LAYERS_OF_PEFT, QUANTIZED, REASONS, VARIANTS
from flatlora.layers.tensor_parallel import part_of


class RowParallelLinear(nn.Linear):
    """Megatron's layer, as far as peft uses it."""

    input_is_parallel = True

    def __init__(self, input_size, output_size, bias=True, **_):
        super().__init__(input_size, output_size, bias=bias)


def megatron():
    backend = SimpleNamespace(RowParallelLinear=RowParallelLinear)
    options = {"backend": backend, "megatron_config": SimpleNamespace()}
    config = peft.LoraConfig(r=2, init_lora_weights=False)  # peft 0.21 fails to initialize these
    return LoraParallelLinear(RowParallelLinear(8, 6), "default", config, r=2, **options)


def transformer_engine():
    return TeLinear(nn.Linear(8, 6), "default", peft.LoraConfig(r=2), r=2)


CASES = [(megatron, "tensor parallelism"), (transformer_engine, "may normali.e x inside the layer")]


@pytest.mark.parametrize("make, reason", CASES, ids=["megatron", "transformer-engine"])
def test_attach_names_the_layer_and_the_reason(make, reason):
    model = nn.ModuleDict({"wide": make()})
    with pytest.raises(ValueError, match=f"'wide' .*cannot be perturbed: .*{reason}"):
        attach(model)
    with pytest.warns(UserWarning, match=f"'wide' .*{reason}.*trained without noise"):
        attach(model, on_unsupported="warn", schedule="constant")


class Wide(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.wide = layer


SPLIT = {  # transformers' plan, layer, the reason
    "before DTensors": ("colwise", nn.Linear(8, 6), "transformers 5.17 or later is needed"),
    "convolution": ("colwise", nn.Conv2d(8, 6, 1), "a Conv2d over a Conv2d is supported whole only: use FSDP2"),
}


@pytest.mark.parametrize("plan, layer, reason", SPLIT.values(), ids=SPLIT)
def test_a_layer_split_by_tensor_parallelism(plan, layer, reason):
    model = Wide(copy.deepcopy(layer))
    model.wide._hf_tp_plan, model.wide._hf_device_mesh = plan, None
    with pytest.raises(ValueError, match=f"'wide' .*split by tensor parallelism, and {reason}"):
        get_flat_peft_model(model, FlatLoraConfig(target_modules=["wide"]))


@pytest.fixture
def two_processes():
    """This process is the first of two, with collective operations that do nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def split_weight(module, name, mesh, placement):
    weight = distribute_tensor(getattr(module, name).detach(), mesh, [placement])
    setattr(module, name, nn.Parameter(weight, requires_grad=False))


def test_a_plan_for_which_peft_splits_no_factor(two_processes):
    model = Wide(nn.Linear(8, 6))
    split_weight(model.wide, "weight", two_processes, Shard(0))
    model.wide._hf_tp_plan = "colwise_gather_output"
    with pytest.raises(ValueError, match="'wide' .*splits no factor for the plan 'colwise_gather_output', but for"):
        get_flat_peft_model(model, FlatLoraConfig(target_modules=["wide"]))


def test_experts_that_are_split(two_processes):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 8, 6))

        def forward(self, x):
            return x @ self.up[0]

    model = Wide(Experts())
    split_weight(model.wide, "up", two_processes, Shard(2))
    with pytest.raises(ValueError, match="split by tensor parallelism, and experts are supported whole only"):
        get_flat_peft_model(model, FlatLoraConfig(target_modules=[], target_parameters=["wide.up"]))


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Shard(-1)], ids=str)
@pytest.mark.parametrize("shape", [(6, 8), (7, 9), (1, 1)], ids=str)
def test_the_part_of_a_split_weight(two_processes, shape, placement):
    whole = torch.randn(shape)
    for rank in range(2):
        sizes = whole.chunk(2, placement.dim)
        local = sizes[rank] if rank < len(sizes) else whole.narrow(placement.dim, 0, 0)
        split = DTensor.from_local(
            local, two_processes, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        with mock.patch.object(type(two_processes), "get_local_rank", return_value=rank):
            part = part_of(split)
        assert torch.equal(part.weight, local) and part.columns == shape[1] and part.by_columns == (placement.dim != 0)
        assert torch.equal(whole[part.first_row :, part.first_column :][: local.shape[0], : local.shape[1]], local)


@pytest.mark.parametrize("placement", [Replicate(), Partial(), _StridedShard(0, split_factor=2)], ids=str)
def test_a_weight_that_is_not_split_into_blocks(two_processes, placement):
    weight = DTensor.from_local(torch.zeros(4, 4), two_processes, [placement], run_check=False)
    with pytest.raises(RuntimeError, match="only weights that are split into consecutive blocks of rows or columns"):
        part_of(weight)


def test_a_base_layer_whose_forward_was_replaced():
    """compressed-tensors replaces the forward to quantize x."""
    model = nn.ModuleDict({"wide": nn.Linear(8, 6)})
    model["wide"].forward = lambda x: nn.functional.linear(x.round(), model["wide"].weight)
    with pytest.raises(ValueError, match="'wide' .*the forward of its Linear was replaced"):
        get_flat_peft_model(model, FlatLoraConfig(target_modules=["wide"]))


def classes_of_peft():
    """Class name -> names of its bases, for all classes of peft's LoRA, defined here or not."""
    folder = Path(peft.tuners.lora.__file__).parent
    found = [node for file in folder.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    return {c.name: {ast.unparse(base) for base in c.bases} for c in found if isinstance(c, ast.ClassDef)}


@pytest.mark.parametrize("kind", ["LoraLayer", "LoraVariant"])
def test_each_layer_and_variant_of_peft_works_or_has_a_reason(kind):
    """A class that peft adds later is refused by its name, and fails this test."""
    bases, found = classes_of_peft(), set()
    while new := {name for name in bases if bases[name] & {kind, *found}} - found:
        found |= new
    merged = {"MultiheadAttention", "ParamWrapper"}
    known = {c.__name__ for c in LAYERS_OF_PEFT + VARIANTS} | {*QUANTIZED, *REASONS} | merged
    assert {name for name in found if not name.startswith("_")} - known - {"DoraEmbeddingVariant"} == set()
