"""Parts of one model that were adapted separately (vision and language, two encoders) share one perturbation.

Each part gets a perturbation when it is adapted, since nothing is known of the whole then. The parts are joined when a
function of ours is given the whole, or where the whole is called: with the settings and the seed of the first part in
the order of the model's modules, and with noise streams that go on counting from part to part.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from .passes import root_of
from .spread import calling_modules
from .steps import unwatch, watched


def perturbations(model: nn.Module) -> list[Any]:
    """The perturbations of the flat layers in a model; one, if what can be joined has been joined."""
    found: list[Any] = []
    for module in _modules(model):
        state = module.__dict__.get("perturbation")
        if state is not None and not any(state is other for other in found):
            found.append(state)
    if len(found) > 1:
        return _join(model, found)
    for state in found:
        state.bind(model)
    return found


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """`model.modules()`, but for peft's attention, which puts new weights in place when it is asked for its modules."""
    seen, todo = {model}, [model]
    while todo:
        module = todo.pop()
        yield module
        inside = [child for child in module._modules.values() if child is not None and child not in seen]
        seen.update(inside)
        todo += reversed(inside)


def join_parts(state: Any) -> None:
    """Where a pass begins: join the perturbations of the modules that call each other just now."""
    if len(watched()) == 1:
        return
    for module in calling_modules():
        if module not in state.known_modules and not getattr(module, "_is_replica", False):
            state.known_modules.add(module)
            perturbations(module)


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
    taken = {layer.stream for other in others for layer in other.layers_alive() if other.seed == state.seed}
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
