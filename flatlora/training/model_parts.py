"""Join the perturbations of parts of one model that were adapted separately (vision and language, two encoders).

Each part gets a perturbation when it is adapted, because the whole model is not known then. The parts are joined when a
function of this library is given the whole, or when the whole is called to train. The joined perturbation has the
settings and the seed of the first part in the order of the model's modules, and its noise streams are numbered from
part to part. Parts that are not at the beginning of the same run stay apart: a student and its trained teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .distributed import calling_modules
from .optimizer_steps import ignore, listeners

if TYPE_CHECKING:
    from .perturbation import Perturbation


def perturbations(model: nn.Module) -> list[Perturbation]:
    """The perturbations of the flat layers in a model: one, if all parts can be joined."""
    found: list[Perturbation] = []
    for module in _modules(model):
        perturbation = module.__dict__.get("perturbation")
        if perturbation is not None and not any(perturbation is other for other in found):
            found.append(perturbation)
    if len(found) > 1:
        return _join(model, found)
    for perturbation in found:
        perturbation.registry.bind(model)
    return found


def join_calling_parts(perturbation: Perturbation) -> None:
    """Where a pass begins: join the perturbations of the modules on the call stack, if it trains."""
    if len(listeners()) == 1 or not torch.is_grad_enabled():
        return
    for module in calling_modules():
        if module not in perturbation.known_modules and not getattr(module, "_is_replica", False):
            perturbation.known_modules.add(module)
            perturbations(module)


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """`model.modules()`, except that peft's attention is not asked for its modules, which would replace its weights."""
    seen, todo = {model}, [model]
    while todo:
        module = todo.pop()
        yield module
        inside = [child for child in module._modules.values() if child is not None and child not in seen]
        seen.update(inside)
        todo += reversed(inside)


def _join(model: nn.Module, parts: list[Perturbation]) -> list[Perturbation]:
    kept: list[Perturbation] = []
    for part in parts:
        into = next((first for first in kept if _can_join(first, part)), None)
        if into is None:
            _separate_streams(part, kept)
            kept.append(part)
        else:
            _move(part, into, model)
    kept[0].registry.set_model(model)
    return kept


def _can_join(first: Perturbation, second: Perturbation) -> bool:
    """Whether two perturbations are at the beginning of the same run, with one rho for adapters of one name."""
    shared = first.rhos.keys() & second.rhos.keys()
    same = point(first) == point(second) and all(first.rhos[name] == second.rhos[name] for name in shared)
    return same and not first.steps


def point(perturbation: Perturbation) -> dict[str, Any]:
    """The settings of a run, and where it is: what parts must have in common to be joined."""
    now = {name: getattr(perturbation, name) for name in ("steps", "progress", "total_steps")}
    return {**vars(perturbation.settings), **now, "enabled": perturbation.overrides.switch}


def _move(part: Perturbation, into: Perturbation, model: nn.Module) -> None:
    """Give the layers, hooks and strengths of one perturbation to another one."""
    into.rhos.update(part.rhos)
    into.noise.sample, into.noise.sample_used = max(into.noise_position(), part.noise_position())
    watched = part.passes.watched()
    part.passes.close(part.registry.model)
    for module in [model, *watched]:
        into.passes.watch(module)
    _give_streams(part, into)
    into.registry.is_joined = True
    ignore(part)


def _separate_streams(part: Perturbation, others: list[Perturbation]) -> None:
    """Give a part other streams than those of other parts with the same seed, so that their noise differs.

    The streams of a run that has begun stay as they are.
    """
    if part.steps:
        return
    taken = {layer.stream for other in others for layer in other.registry.alive() if other.seed == part.seed}
    if any(layer.stream in taken for layer in part.registry.alive()):
        part.registry.start_streams_at(max(taken) + 1)
        _give_streams(part, part)


def _give_streams(part: Perturbation, into: Perturbation) -> None:
    """Give the layers of a perturbation the next streams of `into`, in the order of their streams."""
    for layer in part.registry.take_all():
        layer.join(into, into.registry.stream_of(layer.anchor()))
