"""The data-parallel rank of a process: processes that share a batch share their noise.

| who divides the work                 | where this is found                 |
|--------------------------------------|-------------------------------------|
| accelerate, `ParallelismConfig`      | device mesh in accelerate's state   |
| transformers, `DistributedConfig`    | device mesh of the model            |
| torch, `parallelize_module`          | device mesh of the model's weights  |
| DeepSpeed, sequence parallelism      | its sequence-parallel group         |

The processes along a dimension of `SHARED` have the same samples, or parts of them. The rank of a process is its index
in the other dimensions. Without such a dimension it is the rank in the default group.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn

from .distributed import global_rank, is_dtensor

# names of dimensions whose processes share a batch; the first three are those of accelerate and transformers
SHARED = ("tp", "cp", "sp", "pp", "tensor", "context", "sequence", "pipeline", "model")


def data_parallel_rank(mesh: Any = None, process: int | None = None) -> int:
    """The data-parallel rank of a process.

    Args:
        mesh: the device mesh of the model, from `mesh_of`, or None.
        process: rank in the default group; default: this process.
    """
    if not _is_distributed():
        return 0
    process = global_rank() if process is None else process
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    of_accelerate = getattr(state, "_shared_state", {}).get("device_mesh")
    for known in (of_accelerate, mesh):
        rank = None if known is None else _rank_in(_root_of(known), process, torch.distributed.get_world_size())
        if rank is not None:
            return rank
    sequence_parallel = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    group = getattr(sequence_parallel, "_SEQUENCE_PARALLEL_GROUP", None)
    return process if group is None else process // torch.distributed.get_world_size(group)


def mesh_of(model: nn.Module) -> Any:
    """The device mesh of a model of which processes share a batch, or None."""
    if not _is_distributed():
        return None
    parameters: list[Any] = list(model.parameters())
    meshes = [module.__dict__["_device_mesh"] for module in model.modules() if "_device_mesh" in module.__dict__]
    meshes += [parameter.device_mesh for parameter in parameters if is_dtensor(parameter)]
    found = next((mesh for mesh in meshes if mesh is not None and _shared_dimensions(mesh)), None)
    # a mesh without names is also FSDP2's default
    return None if found is not None and found.mesh_dim_names is None and _has_fsdp2(model) else found


def check_shares_noise(mesh: Any, processes: Any) -> None:
    """Check that these processes, among which weights are split, have one data-parallel rank.

    Args:
        mesh: see `data_parallel_rank`.
        processes: the device mesh of the split weights.

    Raises:
        RuntimeError: they do not: nothing says that they share a batch.
    """
    if len({data_parallel_rank(mesh, process) for process in processes.mesh.flatten().tolist()}) > 1:
        raise RuntimeError(
            f"a weight is split over a device mesh whose dimensions have the names {processes.mesh_dim_names}, and "
            "nothing says that its processes share a batch, and so their noise. Name the dimension 'tp' (known names: "
            f"{', '.join(SHARED)}), or set flatlora.perturbation(model).rank to the data-parallel rank."
        )


def _is_distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _has_fsdp2(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _root_of(mesh: Any) -> Any:
    """The mesh from which this one was sliced."""
    return mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh


def _shared_dimensions(mesh: Any) -> list[int]:
    """The dimensions of the mesh's root along which processes share a batch: without names, all."""
    root = _root_of(mesh)
    names = root.mesh_dim_names
    return [d for d in range(root.ndim) if root.size(d) > 1 and (names is None or names[d] in SHARED)]


@functools.lru_cache(maxsize=64)
def _rank_in(root: Any, process: int, world_size: int) -> int | None:
    """The index of a process in the dimensions of a root mesh that do not share a batch; None if no dimension does."""
    ranks, shared = root.mesh, _shared_dimensions(root)
    if not shared or not (ranks == process).any():
        return None
    data = [d for d in range(ranks.ndim) if d not in shared]
    by_batch = ranks.permute(*data, *shared).flatten(len(data))  # (..., processes that share a batch)
    groups = by_batch.reshape(-1, by_batch.shape[-1])
    (mine,) = (groups == process).any(dim=1).nonzero(as_tuple=True)
    # if each group has a mesh of its own, its first process stands for it
    return int(mine[0]) if ranks.numel() == world_size else int(groups[mine[0]].min())
