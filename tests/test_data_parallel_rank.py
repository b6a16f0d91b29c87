"""Which processes share their noise: the data-parallel rank, from device meshes of a world in one process."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from helpers import tiny
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from flatlora import perturbation
from flatlora.ops.philox import mix_rank
from flatlora.training.data_parallel import check_shares_noise, data_parallel_rank, mesh_of

WORLD = 8


@pytest.fixture
def rank():
    """This process is one of eight, with collective operations that do nothing."""
    dist.init_process_group("fake", rank=5, world_size=WORLD, store=FakeStore())
    yield 5
    dist.destroy_process_group()


MESHES = {  # shape, names, data-parallel rank of each process
    "tp": ((8,), ("tp",), [0] * 8),
    "dp, tp": ((4, 2), ("dp", "tp"), [0, 0, 1, 1, 2, 2, 3, 3]),
    "tp, dp": ((2, 4), ("tp", "dp"), [0, 1, 2, 3] * 2),
    "replicate, shard, cp": ((2, 2, 2), ("dp_replicate", "dp_shard", "cp"), [0, 0, 1, 1, 2, 2, 3, 3]),
    "pp, fsdp, tp": ((2, 2, 2), ("pp", "fsdp", "tp"), [0, 0, 1, 1] * 2),
    "shard": ((2, 4), ("replicate", "shard"), list(range(8))),
    "no names": ((2, 4), None, [0] * 8),
    "one": ((8, 1), ("dp", "tp"), list(range(8))),
}


@pytest.mark.parametrize("shape, names, expected", MESHES.values(), ids=MESHES)
def test_rank_in_a_mesh(rank, shape, names, expected):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    assert data_parallel_rank(mesh) == expected[rank]
    assert [data_parallel_rank(mesh, process) for process in range(WORLD)] == expected
    if names is not None:  # a dimension knows its mesh
        assert {data_parallel_rank(mesh[name]) for name in names} == {expected[rank]}


def test_groups_with_a_mesh_of_their_own_are_named_by_their_first_process(rank):
    first = rank // 2 * 2
    assert data_parallel_rank(DeviceMesh("cpu", [first, first + 1], mesh_dim_names=("tp",))) == first


def test_without_a_mesh_it_is_the_rank_of_the_process(rank):
    assert data_parallel_rank() == rank and data_parallel_rank(None, 5) == 5


def split_linear(mesh):
    linear = nn.Linear(4, 8)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight, mesh, [Replicate()]))
    return linear


def test_the_mesh_of_a_model(rank):
    assert mesh_of(nn.Linear(2, 2)) is None
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    assert data_parallel_rank(mesh_of(nn.Sequential(nn.Linear(2, 2), split_linear(mesh["tp"])))) == rank // 2
    of_transformers = nn.Linear(2, 2)
    of_transformers._device_mesh = mesh
    assert data_parallel_rank(mesh_of(nn.Sequential(of_transformers))) == rank // 2
    unnamed = init_device_mesh("cpu", (8,))
    assert mesh_of(nn.Sequential(split_linear(unnamed))) is unnamed


def test_the_mesh_of_fsdp2_is_data_parallel(rank):
    unnamed = nn.Sequential(nn.Linear(8, 8))
    fully_shard(unnamed)
    named = nn.Sequential(nn.Linear(8, 8))
    fully_shard(named, mesh=init_device_mesh("cpu", (2, 4), mesh_dim_names=("replicate", "shard")))
    for model in (unnamed, named):
        assert mesh_of(model) is None


def test_a_mesh_whose_names_say_nothing(rank):
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("x", "y"))
    with pytest.raises(RuntimeError, match=r"dimensions have the names \('y',\).*Name the dimension 'tp'.*rank to"):
        check_shares_noise(None, mesh["y"])
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    check_shares_noise(mesh, mesh["tp"])


def test_context_parallelism_of_accelerate(rank, monkeypatch):
    """A model in which nothing is split: each process has a part of the sequence."""
    config = ParallelismConfig(dp_shard_size=2, cp_size=4)
    monkeypatch.setitem(AcceleratorState._shared_state, "device_mesh", config.build_device_mesh("cpu"))
    run = perturbation(tiny.flat_model())
    assert run.rank == rank // 4 and run.noise.mixed_seed() == mix_rank(7, rank // 4)
    run.rank = 5
    assert run.rank == 5
    run.rank = None
    monkeypatch.setitem(AcceleratorState._shared_state, "device_mesh", None)
    assert run.rank == rank


def test_data_parallelism_of_accelerate(rank, monkeypatch):
    mesh = ParallelismConfig(dp_replicate_size=2, dp_shard_size=4).build_device_mesh("cpu")
    monkeypatch.setitem(AcceleratorState._shared_state, "device_mesh", mesh)
    assert data_parallel_rank() == rank


def test_sequence_parallelism_of_deepspeed(rank, monkeypatch):
    """Its groups are of consecutive processes."""
    group = dist.new_group([rank // 4 * 4 + i for i in range(4)])
    state = SimpleNamespace(_SEQUENCE_PARALLEL_GROUP=group)
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.sequence_parallel.parallel_state_sp", state)
    assert data_parallel_rank() == rank // 4


def test_one_process_has_rank_zero():
    assert data_parallel_rank() == 0 and mesh_of(nn.Linear(2, 2)) is None
    assert torch.equal(torch.tensor(mix_rank(3, 0)), torch.tensor(3))
