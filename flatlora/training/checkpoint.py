"""Check the saved state of a perturbation as a whole, before anything is changed.

The state is what `Perturbation.state_dict` returns, after JSON or `torch.save`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import check_rho
from ..methods.base import MethodState
from ..utils.arguments import INT64, SEED, WrongType, boolean, integer, number, shown
from .distributed import whole_shape
from .layer_registry import LayerRegistry

NUMBERS = ("seed", "sample", "sample_used", "steps", "total_steps", "origin", "rhos")
METHOD = ("tensors", "method")  # what the method keeps: not in the JSON file of a Trainer
OLD_NAMES = {"climber": "method", "stale": "sample_used"}  # in files of version 0.1.0 and before
WAY_OUT = "Take the state from an intact checkpoint of this model; nothing has been changed"


def check_state(state: Any, rhos: Iterable[str], registry: LayerRegistry, method_state: MethodState) -> dict[str, Any]:
    """The state in plain types.

    Args:
        state: what was loaded.
        rhos: names of the flat adapters of this model.
        registry: its layers.
        method_state: what its method remembers.

    Raises:
        ValueError: an entry is wrong; the message names it.
    """
    try:
        return _checked(state, sorted(rhos), registry, method_state)
    except ValueError as error:
        raise type(error)(f"the state of the perturbation cannot be loaded: {error}. {WAY_OUT}.") from None


def _checked(state: Any, adapters: list[str], registry: LayerRegistry, method_state: MethodState) -> dict[str, Any]:
    if not isinstance(state, Mapping):
        raise WrongType(f"state must be what perturbation(model).state_dict() returned, got {shown(state)}")
    state = {OLD_NAMES.get(name, name): value for name, value in state.items()}
    missing = [name for name in NUMBERS if name not in state]
    unknown = [name for name in state if name not in (*NUMBERS, *METHOD)]
    if missing or unknown:
        what = f"lacks {missing}" if missing else f"has unknown entries {unknown}"
        raise ValueError(f"state {what}")
    kept = [tuple(tensor.shape) for _, layer in registry.named() for tensor in layer.offsets.values()]
    return {
        "seed": integer("seed", state["seed"], *SEED),
        "sample": integer("sample", state["sample"], 0, INT64),
        "sample_used": boolean("sample_used", state["sample_used"]),
        "steps": integer("steps", state["steps"], 0, INT64),
        "total_steps": integer("total_steps", state["total_steps"], 1, INT64, optional=True),
        "origin": _origin(state["origin"]),
        "rhos": _rhos(adapters, state["rhos"]),
        "tensors": _tensors(registry, state.get("tensors", {})),
        "method": method_state.check(state.get("method"), kept),
    }


def _origin(value: Any) -> tuple[float, int]:
    """Progress, and the step at which it was set."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"origin must be a pair of a progress and a step, got {shown(value)}")
    return number("origin[0]", value[0], 0, 1, expected="in [0, 1]"), integer("origin[1]", value[1], 0, INT64)


def _rhos(adapters: list[str], value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise WrongType(f"rhos must be a strength for each flat adapter, got {shown(value)}")
    unknown = [name for name in value if name not in adapters]
    if unknown:
        raise ValueError(f"rhos has {unknown}, and the flat adapters of this model are {adapters}")
    return {name: check_rho(f"rhos[{name!r}]", rho) for name, rho in value.items()}


def _tensors(registry: LayerRegistry, value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        raise WrongType(f"tensors must be a mapping of names to tensors, got {shown(value)}")
    known = _shapes(registry) if value else {}
    for name, tensor in value.items():
        if name not in known:
            raise ValueError(f"tensors has {shown(name)}, and this model has no such layer, factor or adapter")
        check_tensor(f"tensors[{name!r}]", tensor, {known[name]})
    return dict(value)


def _shapes(registry: LayerRegistry) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that a method may keep: of the present one, or of the factor that it is added to."""
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in registry.named():
        for adapter in layer.flat_adapters:
            for factor in ("lora_A", "lora_B"):
                if adapter in getattr(layer, factor, {}):
                    found[f"{name}.{factor}.{adapter}"] = tuple(whole_shape(getattr(layer, factor)[adapter].weight))
        found |= {f"{name}.{factor}.{adapter}": tuple(t.shape) for (factor, adapter), t in layer.offsets.items()}
    return found


def check_tensor(name: str, value: Any, shapes: set[tuple[int, ...]]) -> None:
    """Check a tensor that was loaded.

    Raises:
        ValueError: it is not a finite floating-point tensor of one of these shapes.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise WrongType(f"{name} must be a floating-point tensor, got {shown(value)}")
    if tuple(value.shape) not in shapes:
        expected = " or ".join(map(str, sorted(shapes)))
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity in it")
