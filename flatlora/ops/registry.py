"""Registry of adapted layers, by which autograd nodes and compiled code call back the layer they belong to.

A layer is known by its number, an integer, so that neither a graph of autograd nor compiled code keeps it alive.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

from torch import Tensor


class Layer(Protocol):
    """What `ops` requires of a registered layer."""

    def on_backward(self) -> None:
        """Called when a backward pass reaches the layer: the noise sample of its forward has been used."""

    def compiled_noise(self) -> tuple[Tensor, Tensor]:
        """Standard deviation of each row of eps, (m,), and the key of the noise, for a forward that was compiled."""


LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)  # 0 stands for no layer


def register(layer: Layer) -> int:
    """Register a layer under a new number, which is returned."""
    number = next(_numbers)
    LAYERS[number] = layer
    return number


def unregister(number: int) -> None:
    """Remove a layer; a number that is not registered is ignored."""
    LAYERS.pop(number, None)


def backward_began(number: int) -> None:
    """Call `Layer.on_backward` of the layer with this number, if it still exists."""
    layer = LAYERS.get(number)
    if layer is not None:
        layer.on_backward()
