"""The private names of flatlora that tests of several files read. Each is here because no public name shows the same.

- The row norms that a layer keeps: `analysis.merged_row_norms` computes them anew, so it cannot show an outdated cache.
- The strength of one layer, which several adapters share: `Perturbation.rho` is that of the whole model.
- The entries of a registry, dead ones too: `LayerRegistry.alive` leaves those out.
- The hooks on torch's optimizers, which all models of the process share.
"""

import weakref

from flatlora.training import optimizer_steps


def row_norms(layer):
    """||W'_i|| as the layer takes them for its noise, from its cache where that is up to date."""
    return layer.row_norms()


def kept_row_norms(layer):
    """||W'_i|| as the last forward left them in the cache of the layer."""
    return layer._norms["merged"][1]


def strength(layer):
    """rho of the adapters that are active in the layer."""
    return layer.rho()


def entries(registry):
    """How many layers and weights a `LayerRegistry` lists, existing or not."""
    return len(registry._layers) + len(registry._weights)


def forget_other_models(monkeypatch):
    """Models of other tests may be alive: count the hooks on torch's optimizers from zero."""
    monkeypatch.setattr(optimizer_steps, "_listeners", weakref.WeakSet())
    monkeypatch.setattr(optimizer_steps, "_handles", [])
