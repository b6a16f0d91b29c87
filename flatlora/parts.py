"""Parts of one model that were adapted separately (vision and language, two encoders) share one perturbation.

Each part gets a perturbation when it is adapted, since nothing is known of the whole then. The parts are joined when a
function of ours is given the whole, or at the first training pass: with the settings and the seed of the first part in
the order of the model's modules, and with noise streams that go on counting from part to part.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import nn

from .passes import root_of
from .steps import unwatch, watched


def perturbations(model: nn.Module) -> list[Any]:
    """The perturbations of the flat layers in a model; one, if what can be joined has been joined."""
    found: list[Any] = []
    for module in model.modules():
        state = module.__dict__.get("perturbation")
        if state is not None and not any(state is other for other in found):
            found.append(state)
    if len(found) > 1:
        return _join(model, found)
    for state in found:
        state.bind(model)
    return found


def join_parts(state: Any) -> None:
    """Join a perturbation with those of other parts of the same model."""
    others = [other for other in watched() if other is not state and other.model is not None]
    if state.model is None or not others:
        return
    parents = _parents()
    ours = _ancestors(state.model, parents)
    for other in others:
        shared = [module for module in _ancestors(other.model, parents) if any(module is one for one in ours)]
        if shared:
            perturbations(shared[-1])  # the outermost


def _join(model: nn.Module, states: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for state in states:
        into = next((first for first in kept if can_join(first, state)), None)
        if into is None:
            _keep_apart(state, kept)
            kept.append(state)
        else:
            _move(state, into, model)
    kept[0]._model = weakref.ref(root_of(model))
    return kept


def can_join(first: Any, second: Any) -> bool:
    """Have two perturbations the same settings, and the same strength for adapters of one name?"""
    shared = first.rhos.keys() & second.rhos.keys()
    return first.settings == second.settings and all(first.rhos[name] == second.rhos[name] for name in shared)


def _move(state: Any, into: Any, model: nn.Module) -> None:
    """All that one perturbation has becomes another one's."""
    into.rhos.update(state.rhos)
    watched_by_it = state.passes.watched()
    state.passes.close(state.model)
    for module in [model, *watched_by_it]:
        into.passes.watch(module)
    _give_streams(state, into)
    unwatch(state)


def _keep_apart(state: Any, others: list[Any]) -> None:
    """Other streams than those of other parts: the same seed must not mean the same noise."""
    taken = {layer.stream for other in others for layer in other.layers_alive()}
    if any(layer.stream in taken for layer in state.layers_alive()):
        state.layers = max(taken) + 1
        state._weights = []
        _give_streams(state, state)


def _give_streams(state: Any, into: Any) -> None:
    """The layers of a perturbation get the next streams of `into`, in the order that they had."""
    layers, state._layers = sorted(state.layers_alive(), key=lambda layer: layer.stream), []
    for layer in layers:
        layer.__dict__.update(perturbation=into, stream=into.stream_of(layer.anchor()))
        into.enrol(layer)


def _parents() -> dict[int, list[nn.Module]]:
    """The modules of this process by the id of their children: torch's modules do not know their parents."""
    parents: dict[int, list[nn.Module]] = {}
    for found in gc.get_objects():
        if issubclass(type(found), nn.Module) and "_modules" in found.__dict__:
            for child in found._modules.values():
                parents.setdefault(id(child), []).append(found)
    return parents


def _ancestors(module: nn.Module, parents: dict[int, list[nn.Module]]) -> list[nn.Module]:
    """The module and all that contain it, nearest first."""
    found = [module]
    for one in found:  # grows while it is gone through
        found += [parent for parent in parents.get(id(one), ()) if not any(parent is other for other in found)]
    return found
