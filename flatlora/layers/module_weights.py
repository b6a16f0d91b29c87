"""The weight of a module whose weight is not simply there: sharded, offloaded, parametrized, or made by a hook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..training.distributed import FSDP1_MODULE, is_dtensor


def whole_weight(module: Any) -> Tensor:
    """The weight of a module as its forward reads it.

    FSDP1, ZeRO-3 and offloading provide it for the length of a call. Old-style `weight_norm`, `spectral_norm` and
    `prune` compute it in a pre-hook; here it is computed without a power iteration.

    Raises:
        RuntimeError: the module has no weight in memory.
    """
    for hook in module._forward_pre_hooks.values():
        if getattr(hook, "_tensor_name" if isinstance(hook, BasePruningMethod) else "name", None) != "weight":
            continue
        if isinstance(hook, BasePruningMethod):
            pruned: Tensor = hook.apply_mask(module)  # type: ignore[no-untyped-call]  # torch's
            return pruned
        if isinstance(hook, WeightNorm):
            normalized: Tensor = hook.compute_weight(module)
            return normalized
        if isinstance(hook, SpectralNorm):
            return hook.compute_weight(module, do_power_iteration=False)
    if _is_here(module):
        here: Tensor = module.weight
        return here
    inner = _inner(module)
    found: list[Tensor] = []

    def look(probe: Tensor) -> Tensor:
        found.append(inner.weight.detach().clone())
        return probe

    with replaced_forward(inner, look), torch.no_grad():
        module(torch.empty(0))
    weight = found[0]
    if weight.is_meta:
        raise RuntimeError(
            "an adapter has no memory (device 'meta'), as peft creates it for an offloaded layer. Keep that layer on a "
            "device, or allocate the adapter: lora_A.to_empty(device=...), lora_B.to_empty(device=...), "
            "reset_lora_parameters."
        )
    return weight


@contextmanager
def moved_weight(module: Any, offset: Tensor) -> Iterator[None]:
    """Inside, a module has weight + offset for its weight. Nothing is written.

    An offset that is a leaf and requires a gradient gets the one of the weight, in place of the parameter.

    A parametrized module computes its weight whenever it is read, so the offset is one more parametrization. FSDP1,
    ZeRO-3, offloading and pre-hooks provide the weight when the module is called, so the offset is added in the call.
    To any other weight it is added here.

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
            f"{type(inner).__name__}.weight is a property of its class, to which nothing can be added for one call. "
            "Use torch.nn.utils.parametrize.register_parametrization, or leave the layer out of target_modules."
        )
    # ZeRO-3 may have fetched the weight ahead of the call, and frees it in the backward of the call
    here = _is_here(module) and not hasattr(inner.weight, "ds_id")
    ready = _moved(inner.weight, offset) if here else None
    forward = getattr(inner, _forward_name(inner))

    def moved(x: Tensor) -> Tensor:
        weight = inner.weight
        with attributes(inner, weight=weight if weight is ready else _moved(weight, offset)):
            out: Tensor = forward(x)
            return out

    with ExitStack() as stack:
        if here:
            stack.enter_context(attributes(inner, weight=ready))
        if not here or inner._forward_pre_hooks:
            stack.enter_context(replaced_forward(inner, moved))
        yield


def _moved(weight: Tensor, offset: Tensor) -> Tensor:
    takes_gradient = offset.is_leaf and offset.requires_grad
    moved: Tensor = (weight.detach() if takes_gradient else weight) + offset.to(weight)
    return moved


class AppliedFunction(nn.Module):
    """A function as a parametrization."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


def replaced_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """Inside, `module(x)` runs its hooks and `forward`."""
    return attributes(module, **{_forward_name(module): forward})


@contextmanager
def attributes(module: Any, **values: Any) -> Iterator[None]:
    """Inside, a module has these values in its `__dict__`, where they hide its parameters and its class.

    A value that was replaced meanwhile stays. An error inside is passed on unchanged.
    """
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


def is_gathered(module: Any) -> bool:
    """Whether the weight comes from a collective operation, in which all processes take part (FSDP1, ZeRO-3)."""
    # AdaLoRA keeps tensors instead of modules
    return _inner(module) is not module or hasattr(getattr(module, "weight", module), "ds_id")


def refuse_fsdp1(what: str, modules: Iterable[Any], way_out: str) -> None:
    """Refuse modules that FSDP1 wraps.

    Raises:
        RuntimeError: peft reads the weight of a module without calling it, and FSDP1 provides it for a call only.
    """
    if any(_inner(module) is not module for module in modules):
        raise RuntimeError(
            f"{what} cannot be trained under FSDP1 with peft's wrap policy, also not with plain LoRA: peft reads the "
            f"weights of lora_A and lora_B without calling them, and they are not whole then. {way_out}"
        )


def _inner(module: Any) -> Any:
    return getattr(module, FSDP1_MODULE, module)


def _is_here(module: Any) -> bool:
    weight = module.weight
    if _inner(module) is not module or weight.numel() == 0 or weight.is_meta or is_dtensor(weight):
        return False
    # ZeRO-3 gives a weight its memory before it has arrived
    status = getattr(weight, "ds_status", None)
    return status is None or status.name == "AVAILABLE"


def _forward_name(module: nn.Module) -> str:
    """The attribute with a module's own forward: accelerate keeps it under another name."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


@contextmanager
def _one_more_parametrization(module: Any, offset: Tensor) -> Iterator[None]:
    """Add the offset in a last parametrization. `parametrize.cached()` must keep neither weight."""
    parts, cached = module.parametrizations["weight"], (id(module), "weight")
    parts.append(AppliedFunction(lambda weight: _moved(weight, offset)))
    parametrize._cache.pop(cached, None)
    try:
        yield
    finally:
        del parts[-1]
        parametrize._cache.pop(cached, None)
