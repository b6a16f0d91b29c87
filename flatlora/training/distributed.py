"""Models that are distributed over processes or devices."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

FSDP1_MODULE = "_fsdp_wrapped_module"  # where FSDP1 keeps the module that it wraps
_CALL_CODE = nn.Module._wrapped_call_impl.__code__  # the function that calls each module


def global_rank() -> int:
    """The rank of this process in the default group, 0 without one."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds only a part of a parameter between forwards (FSDP, ZeRO-3, tensor parallelism)."""
    return is_dtensor(parameter) or hasattr(parameter, "ds_id") or is_fsdp1(parameter)


def is_fsdp1(parameter: Tensor | None) -> bool:
    """Whether this is a part of FSDP1's flattened parameters."""
    return hasattr(parameter, "_fsdp_flattened")


def is_zero(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO keeps the value that its optimizer updates elsewhere, divided among the processes."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def is_divided(parameter: Tensor) -> bool:
    """Whether this process updates only a part of a parameter (FSDP, ZeRO)."""
    return is_sharded(parameter) or is_zero(parameter)


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter in one process. ZeRO-3 leaves nothing of it in place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def name_without_fsdp1(name: str) -> str:
    """The name of a module without the names of FSDP1's wrappers."""
    return name.replace(f"{FSDP1_MODULE}.", "")


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether this is a DTensor (FSDP2, tensor parallelism)."""
    return hasattr(tensor, "device_mesh")


def is_deepspeed(model: Any) -> bool:
    """Whether this is a DeepSpeed engine."""
    kind = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    return kind is not None and isinstance(model, kind)


def calling_modules() -> Iterator[nn.Module]:
    """The modules whose calls are on the stack of this thread, innermost first.

    Only frames of torch's module calls are inspected, because reading the locals of other frames keeps them alive.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL_CODE:
            yield frame.f_locals["self"]
        frame = frame.f_back


def calling_deepspeed() -> Any:
    """The DeepSpeed engine whose forward is on the stack, or None.

    DeepSpeed replaces the user's optimizer, and nothing on the model refers to the new one. The engine counts its
    steps, and each training forward is called by it.
    """
    if "deepspeed" not in sys.modules:
        return None
    return next((module for module in calling_modules() if is_deepspeed(module)), None)
