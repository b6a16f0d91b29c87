"""A model that is spread over processes or devices: what of it is elsewhere, and how it is seen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

WRAPPED = "_fsdp_wrapped_module"  # where FSDP1 keeps what it wraps


_CALL = nn.Module._wrapped_call_impl.__code__  # what calls each module


def global_rank() -> int:
    """The rank of this process in the default group; 0 without one."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def is_sharded(parameter: Tensor) -> bool:
    """Outside of a forward: does this process hold but a part of it (FSDP2, tensor parallelism, ZeRO-3, FSDP1)?"""
    return is_dtensor(parameter) or hasattr(parameter, "ds_id") or hasattr(parameter, "_fsdp_flattened")


def name_in_one_process(name: str) -> str:
    """The name of a module without those of FSDP1's wrappers around it."""
    return name.replace(f"{WRAPPED}.", "")


def is_dtensor(tensor: Tensor | None) -> bool:
    return hasattr(tensor, "device_mesh")


def is_deepspeed(model: Any) -> bool:
    kind = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    return kind is not None and isinstance(model, kind)


def calling_modules() -> Iterator[nn.Module]:
    """The modules in whose call this is called, innermost first.

    Only the frames of torch's module calls are looked at: to read the locals of other frames would keep them alive.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame.f_locals["self"]
        frame = frame.f_back


def calling_deepspeed() -> Any:
    """The DeepSpeed engine in whose forward this is called, or None.

    DeepSpeed puts an optimizer of its own in place of the user's, and nothing on the model leads to it. The engine
    counts its steps, and a training forward is always called by it.
    """
    if "deepspeed" not in sys.modules:
        return None
    return next((module for module in calling_modules() if is_deepspeed(module)), None)


def _inner(module: Any) -> Any:
    return getattr(module, WRAPPED, module)


def refuse_fsdp1(what: str, modules: Any, way_out: str) -> None:
    """
    Raises:
        RuntimeError: peft reads the weight of a module without calling it, and FSDP1 brings it for a call only.
    """
    if any(_inner(module) is not module for module in modules):
        raise RuntimeError(
            f"{what} cannot be trained under FSDP1 with peft's wrap policy, with plain LoRA neither: peft reads the "
            f"weights of lora_A and lora_B there without calling them, and they are not whole. {way_out}"
        )


def _is_here(module: Any) -> bool:
    weight = module.weight
    return _inner(module) is module and weight.numel() > 0 and not weight.is_meta and not is_dtensor(weight)


def is_gathered(module: Any) -> bool:
    """Does the weight come by a collective operation, in which all processes must take part (FSDP1, ZeRO-3)?"""
    return _inner(module) is not module or hasattr(getattr(module, "weight", module), "ds_id")  # AdaLoRA has no modules


def whole_weight(module: Any) -> Tensor:
    """The weight of a module as its forward finds it: FSDP1, ZeRO-3 and offloading bring it for that time only, and
    old-style `weight_norm`, `spectral_norm` and `prune` make it in a pre-hook (without a power iteration here).

    Raises:
        RuntimeError: it is nowhere.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
            return hook.apply_mask(module)
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return hook.compute_weight(module)
        if isinstance(hook, SpectralNorm) and hook.name == "weight":
            return hook.compute_weight(module, do_power_iteration=False)
    if _is_here(module):
        return module.weight
    inner, found = _inner(module), []

    def look(probe: Tensor) -> Tensor:
        found.append(inner.weight.detach().clone())
        return probe

    with replaced_forward(inner, look), torch.no_grad():
        module(torch.empty(0))
    if found[0].is_meta:
        raise RuntimeError(
            "an adapter has no memory (device 'meta'): peft makes it so for a layer that is offloaded. Keep that layer "
            "on a device, or give the adapter memory: lora_A.to_empty(device=...), lora_B.to_empty(device=...), "
            "reset_lora_parameters."
        )
    return found[0]


@contextmanager
def moved_weight(module: Any, offset: Tensor) -> Iterator[None]:
    """A module has weight + offset for a weight, for the time being; nothing is written.

    A parametrized module makes its weight whenever it is read, so the offset is one more parametrization. FSDP1,
    ZeRO-3, offloading and pre-hooks (old-style `weight_norm`, `spectral_norm`, `prune`) bring or make the weight when
    the module is called, so the offset is added in the call. Any other weight is moved here.

    Raises:
        RuntimeError: the weight is a property of the module's class.
    """
    inner = _inner(module)
    if parametrize.is_parametrized(inner, "weight"):
        with _one_more_parametrization(inner, offset):
            yield
        return
    if hasattr(type(inner), "weight"):
        raise RuntimeError(
            f"{type(inner).__name__}.weight is a property of its class, which nothing can be added to for one call. "
            "Use torch.nn.utils.parametrize.register_parametrization, or leave the layer out of target_modules."
        )
    here = _is_here(module)
    ready = inner.weight + offset.to(inner.weight) if here else None
    forward = getattr(inner, _forward_slot(inner))

    def moved(x: Tensor) -> Tensor:
        weight = inner.weight
        with attributes(inner, weight=weight if weight is ready else weight + offset.to(weight)):
            return forward(x)

    with ExitStack() as stack:
        if here:
            stack.enter_context(attributes(inner, weight=ready))
        if not here or inner._forward_pre_hooks:
            stack.enter_context(replaced_forward(inner, moved))
        yield


class Applied(nn.Module):
    """A function as a parametrization."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


@contextmanager
def _one_more_parametrization(module: Any, offset: Tensor) -> Iterator[None]:
    """The last one, which adds the offset. `parametrize.cached()` keeps neither the weight of before nor this one."""
    parts, cached = module.parametrizations["weight"], (id(module), "weight")
    parts.append(Applied(lambda weight: weight + offset.to(weight)))
    parametrize._cache.pop(cached, None)
    try:
        yield
    finally:
        del parts[-1]
        parametrize._cache.pop(cached, None)


def replaced_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """`module(x)` runs its hooks and then `forward`, for the time being."""
    return attributes(module, **{_forward_slot(module): forward})


def _forward_slot(module: nn.Module) -> str:
    """Where a module's own forward is: accelerate keeps it aside."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


@contextmanager
def attributes(module: Any, **values: Any) -> Iterator[None]:
    """A module has these in its `__dict__`, found before its parameters and its class, for the time being. What has
    been put in their place meanwhile stays; an error inside comes out as it is."""
    held = module.__dict__
    before = {name: held[name] for name in values if name in held}
    held.update(values)
    try:
        yield
    finally:
        for name, value in values.items():
            if held.get(name) is value:
                del held[name]
                held.update({name: before[name]} if name in before else {})
