"""Factors as whole tensors, where a model is divided among processes.

| divided by       | value                          | gradient                                  | written            |
| ---------------- | ------------------------------ | ----------------------------------------- | ------------------ |
| nothing, DDP     | the parameter                  | `.grad`                                   | in place           |
| FSDP2, HSDP      | `full_tensor()`                | `full_tensor()` of `.grad`                | the own shard      |
| ZeRO 1, 2, 3     | `safe_get_full_fp32_param`     | `safe_get_full_grad`, before engine.step  | the own partition  |

FSDP1 is refused. It keeps slices of flattened parameters, from which neither the whole shape nor the place can be seen,
and torch makes only whole units complete (`summon_full_params`), which contain W unless the wrap policy is peft's.

The values are those that the optimizer updates: float32 where the forward runs in half precision (MixedPrecisionPolicy,
ZeRO with bf16). The factors are O(r (m + n)); the frozen weights are never gathered here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import is_divided, is_dtensor, is_fsdp1, is_zero, whole_shape


class WholeParameters:
    """Read and write whole parameters. All processes call each of these methods for the same parameters, in one order.

    Gradients can be held for the length of a block (`hold`): those of the first of two passes, and those of DeepSpeed,
    which are available only before its step.
    """

    def __init__(self) -> None:
        self._held: dict[nn.Parameter, Tensor] | None = None
        self._groups: list[dict[str, Any]] | None = None

    def check(self, parameter: Tensor | None, method: str) -> None:
        """Check that parameters like this one can be read.

        Raises:
            RuntimeError: FSDP1 divides them.
        """
        if is_fsdp1(parameter):
            raise RuntimeError(
                f"{method} needs whole factors and gradients at the optimizer's step, and FSDP1 keeps slices of "
                "flattened parameters. Use FSDP2 (fully_shard, fsdp_version: 2), DeepSpeed ZeRO, DDP or one process, "
                "or FlatLoraConfig, which needs none."
            )

    @contextmanager
    def hold(self, gradients: dict[nn.Parameter, Tensor], groups: list[dict[str, Any]] | None = None) -> Iterator[None]:
        """Inside, these are the whole gradients of all parameters, and the parameter groups of the optimizer."""
        self._held, self._groups = gradients, groups
        try:
            yield
        finally:
            self._held = self._groups = None

    @property
    def is_held(self) -> bool:
        """Whether gradients are held."""
        return self._held is not None

    def shape(self, parameter: Tensor) -> torch.Size:
        return whole_shape(parameter)

    def value(self, parameter: nn.Parameter) -> Tensor:
        """The whole value. It is the parameter itself if that is whole."""
        if is_dtensor(parameter):
            return _full(parameter.detach())
        if is_zero(parameter):
            return _zero_value(parameter)
        return parameter

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        return parameter.grad is not None if self._held is None else parameter in self._held

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole gradient, None without one."""
        if self._held is not None:
            return self._held.get(parameter)
        grad = parameter.grad
        return _full(grad) if grad is not None and is_dtensor(grad) else grad

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the whole value. Each process writes its own part."""
        if is_dtensor(parameter):
            _local(parameter).copy_(_own_part(value, parameter))
        elif is_zero(parameter):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value)
        else:
            parameter.copy_(value)

    @torch.no_grad()
    def average_gradients(self, like: nn.Parameter, tensors: Sequence[Tensor]) -> None:
        """Average `.grad` of tensors over the processes among which a parameter like this one is divided.

        A gradient that some processes lack counts as zero there; one that all lack stays None. Nothing is done where
        the parameter is whole.
        """
        if not is_divided(like):
            return
        mesh = getattr(like, "device_mesh", None)
        groups = [None] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            found = [torch.zeros_like(t) if t.grad is None else t.grad for t in same]
            count = torch.tensor([float(t.grad is not None) for t in same], dtype=dtype, device=found[0].device)
            flat = torch.cat([*(grad.flatten() for grad in found), count])
            for group in groups:
                torch.distributed.all_reduce(flat, group=group)
                flat /= torch.distributed.get_world_size(group)
            *means, count = torch.split(flat, [*(t.numel() for t in same), len(same)])
            for tensor, mean, some in zip(same, means, count.tolist(), strict=True):
                tensor.grad = mean.view_as(tensor).clone() if some else None

    def device(self, parameter: Tensor) -> torch.device:
        """The device of its whole value."""
        if is_dtensor(parameter):
            return _mesh_device(parameter)
        return parameter.device

    def groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, with the model's parameters in them."""
        return optimizer.param_groups if self._groups is None else self._groups


def _full(tensor: Any) -> Tensor:
    """A DTensor as a whole; of one that is offloaded, on the device of its mesh, whose collectives need it there."""
    from torch.distributed.tensor import DTensor

    device = _mesh_device(tensor)
    if tensor.device != device:
        tensor = DTensor.from_local(
            tensor.to_local().to(device),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    whole: Tensor = tensor.full_tensor()
    return whole


def _zero_value(parameter: nn.Parameter) -> Tensor:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    value: Tensor
    if parameter.requires_grad:
        value = safe_get_full_fp32_param(parameter)
        return value
    with deepspeed.zero.GatheredParameters([parameter]):  # the optimizer has none of a frozen one
        value = parameter.detach().clone()
    return value


def _mesh_device(tensor: Any) -> torch.device:
    kind = tensor.device_mesh.device_type
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def _local(parameter: Any) -> Tensor:
    local: Tensor = parameter.to_local()
    return local


def _own_part(value: Tensor, parameter: Any) -> Tensor:
    """The part of a whole value that this process holds. No process sends anything."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
