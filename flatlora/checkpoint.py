"""What of a noise's state is read from a file: looked at as a whole before anything is changed.

The state is what `Perturbation.state_dict` gives, through JSON or `torch.save`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .settings import check_rho
from .utils.arguments import INT64, SEED, WrongType, boolean, integer, number, shown

NUMBERS = ("seed", "sample", "stale", "steps", "total_steps", "origin", "rhos")
TENSORS = ("tensors", "climber")  # added to the state later, and absent from what a Trainer keeps in JSON
WAY_OUT = "Take the state from a checkpoint of this model that is whole; nothing has been changed"


def check(perturbation: Any, state: Any) -> dict[str, Any]:
    """The state with plain values.

    Raises:
        ValueError: what is wrong in which entry.
    """
    try:
        return _checked(perturbation, state)
    except ValueError as error:
        raise type(error)(f"the state of the noise cannot be loaded: {error}. {WAY_OUT}.") from None


def _checked(perturbation: Any, state: Any) -> dict[str, Any]:
    if not isinstance(state, Mapping):
        raise WrongType(f"state must be what perturbation(model).state_dict() gave, got {shown(state)}")
    missing = [name for name in NUMBERS if name not in state]
    unknown = [name for name in state if name not in (*NUMBERS, *TENSORS)]
    if missing or unknown:
        what = f"lacks {missing}" if missing else f"has entries that are not known: {unknown}"
        raise ValueError(f"state {what}")
    return {
        "seed": integer("seed", state["seed"], *SEED),
        "sample": integer("sample", state["sample"], 0, INT64),
        "stale": boolean("stale", state["stale"]),
        "steps": integer("steps", state["steps"], 0, INT64),
        "total_steps": integer("total_steps", state["total_steps"], 1, INT64, optional=True),
        "origin": _origin(state["origin"]),
        "rhos": _rhos(perturbation, state["rhos"]),
        "tensors": _tensors(perturbation, state.get("tensors", {})),
        "climber": _climber(perturbation, state.get("climber")),
    }


def _origin(value: Any) -> tuple[float, int]:
    """Progress, and the step it was set at."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"origin must be a pair of a progress and a step, got {shown(value)}")
    return number("origin[0]", value[0], 0, 1, expected="in [0, 1]"), integer("origin[1]", value[1], 0, INT64)


def _rhos(perturbation: Any, value: Any) -> dict[str, float]:
    known = perturbation.rhos
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise WrongType(f"rhos must be a strength for each flat adapter, got {shown(value)}")
    strangers = [name for name in value if name not in known]
    if strangers:
        raise ValueError(f"rhos has {strangers}, and the flat adapters of this model are {sorted(known)}")
    return {name: check_rho(f"rhos[{name!r}]", rho) for name, rho in value.items()}


def _tensors(perturbation: Any, value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        raise WrongType(f"tensors must be a mapping of names to tensors, got {shown(value)}")
    known = _shapes(perturbation) if value else {}
    for name, tensor in value.items():
        if name not in known:
            raise ValueError(f"tensors has {shown(name)}, and this model has no such layer, factor or adapter")
        _check_tensor(f"tensors[{name!r}]", tensor, {known[name]})
    return dict(value)


def _shapes(perturbation: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that a method can keep: what it has now, or that of the factor it moves."""
    found = {}
    for name, layer in perturbation.flat_layers():
        for adapter in layer.flat_adapters:
            for factor in ("lora_A", "lora_B"):
                if adapter in getattr(layer, factor, {}):
                    found[f"{name}.{factor}.{adapter}"] = tuple(getattr(layer, factor)[adapter].weight.shape)
        found |= {f"{name}.{factor}.{adapter}": tuple(t.shape) for (factor, adapter), t in layer.offsets.items()}
    return found


def _check_tensor(name: str, value: Any, shapes: set[tuple[int, ...]]) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise WrongType(f"{name} must be a floating-point tensor, got {shown(value)}")
    if tuple(value.shape) not in shapes:
        expected = " or ".join(map(str, sorted(shapes)))
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity in it")


def _climber(perturbation: Any, value: Any) -> dict[str, Any] | None:
    """The state of the optimizer of Bi-LoRA's second module: which parameters, and their moments."""
    if value is None:
        return None
    groups, moments = (value.get("param_groups"), value.get("state")) if isinstance(value, Mapping) else (None, None)
    if not (
        isinstance(groups, list)
        and isinstance(moments, Mapping)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups)
    ):
        raise WrongType(f"climber must be None or the state_dict() of an optimizer, got {shown(value)}")
    offsets = [tensor for _, layer in perturbation.flat_layers() for tensor in layer.offsets.values()]
    shapes = {tuple(tensor.shape) for tensor in offsets}
    places = [place for group in groups for place in group["params"]]
    if len(places) > len(offsets) or not set(moments) <= set(places):
        raise ValueError(f"climber must be of the {len(offsets)} factors of this model's module 2, got {len(places)}")
    for place, kept in moments.items():
        if not isinstance(kept, Mapping):
            raise WrongType(f"climber['state'][{place!r}] must be a mapping, got {shown(kept)}")
        for key, moment in kept.items():
            if isinstance(moment, Tensor):  # of the size of its factor, or a statistic of its rows, columns or steps
                allowed = shapes if moment.ndim == 2 else {tuple(moment.shape)}
                _check_tensor(f"climber['state'][{place!r}][{key!r}]", moment, allowed)
    return dict(value)
