"""The flat layers of a model, and the noise stream of each."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..methods.base import Offsets
from ..utils.copying import PartlyCopied, no_object
from .forward_passes import root_of


class FlatLayer(Protocol):
    """What the training of a model needs of a flat layer."""

    number: int
    stream: int
    strict: bool
    perturbation: Any
    offsets: Offsets
    flat_adapters: set[str]
    __dict__: dict[str, Any]

    def anchor(self) -> Any:
        """The tensor or module that identifies the frozen weight: layers that share it share their noise."""

    def join(self, perturbation: Any, stream: int) -> None:
        """Take part in a perturbation, with this noise stream."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class LayerRegistry(PartlyCopied):
    """The layers that one perturbation acts on, held weakly, in the order in which they were adapted."""

    not_copied: ClassVar[frozenset[str]] = frozenset({"_model", "_weights", "_layers"})

    def __init__(self, model: nn.Module) -> None:
        self.streams = 0  # noise streams handed out
        self._start()
        self.set_model(model)

    def _start(self) -> None:
        self._model: Callable[[], nn.Module | None] = no_object
        self._weights: list[tuple[weakref.ref[Any], int]] = []  # with its stream: a tied weight has one stream
        self._layers: list[weakref.ref[Any]] = []

    @property
    def model(self) -> nn.Module | None:
        """The model of these layers; None if it does not exist anymore."""
        return self._model()

    def bind(self, model: nn.Module) -> None:
        """Set the model, if it is not known."""
        if self.model is None:
            self.set_model(model)

    is_joined = False  # of parts of a model, which may leave it again

    def set_model(self, model: nn.Module) -> None:
        self._model = weakref.ref(root_of(model))

    def alive(self) -> list[FlatLayer]:
        """The layers that exist."""
        return [layer for layer in (ref() for ref in self._layers) if layer is not None]

    def named(self) -> Iterator[tuple[str, FlatLayer]]:
        """(name in the model, layer) of each layer that is in the model."""
        ours = {id(layer) for layer in self.alive()}
        modules: Any = () if self.model is None else self.model.named_modules()
        for name, module in modules:
            if id(module) in ours:
                yield name, module

    def factors(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of the adapters in these layers."""
        return (parameter for layer in self.alive() for parameter in _factors(layer) if parameter.requires_grad)

    def first_factor(self) -> nn.Parameter | None:
        return next(self.factors(), None)

    def tensors(self) -> dict[str, Tensor]:
        """What the method keeps in the layers, with names ``layer.factor.adapter``; not copies."""
        return {
            f"{name}.{factor}.{adapter}": tensor.detach()
            for name, layer in self.named()
            for (factor, adapter), tensor in layer.offsets.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned.

        A displacement of A or B that is not in it is removed. Other tensors stay: an older file does not have them.
        """
        for name, layer in self.named():
            for factor, adapter in [*layer.offsets]:
                if factor in ("lora_A", "lora_B") and f"{name}.{factor}.{adapter}" not in tensors:
                    del layer.offsets[factor, adapter]
            for key, tensor in tensors.items():
                factor, _, adapter = key.removeprefix(f"{name}.").partition(".")
                if key.startswith(f"{name}.{factor}.") and adapter in layer.flat_adapters:
                    found = layer.offsets.get((factor, adapter))
                    if found is None:
                        layer.offsets[factor, adapter] = tensor.detach().clone()
                    else:
                        found.detach().copy_(tensor)

    def stream_of(self, weight: Any) -> int:
        """The noise stream of a frozen weight: the one that it has, or a new one."""
        for seen, stream in self._weights:
            if seen() is weight:
                return stream
        self._weights.append((weakref.ref(weight), self.streams))
        self.streams += 1
        return self.streams - 1

    def add(self, layer: FlatLayer) -> None:
        """Add a layer that has become flat, or a copy of one.

        The copy of a layer that was copied with its model keeps its stream. The copy of a part of a model, placed
        beside the original, gets a new one.
        """
        # copies that are gone would add up
        self._layers = [ref for ref in self._layers if ref() is not None]
        self._weights = [(ref, stream) for ref, stream in self._weights if ref() is not None]
        anchor = layer.anchor()
        if any(other.stream == layer.stream and other.anchor() is not anchor for other in self.alive()):
            layer.__dict__["stream"] = self.stream_of(anchor)
        elif not any(seen() is anchor for seen, _ in self._weights):
            self._weights.append((weakref.ref(anchor), layer.stream))
        self._layers.append(weakref.ref(layer))

    def remove(self, layers: list[Any]) -> None:
        """Remove layers that are not flat anymore, or not in the model."""
        self._layers = [ref for ref in self._layers if not any(ref() is layer for layer in layers)]

    def take_all(self) -> list[FlatLayer]:
        """Remove all layers and return them, in the order of their streams."""
        layers, self._layers = sorted(self.alive(), key=lambda layer: layer.stream), []
        return layers

    def start_streams_at(self, stream: int) -> None:
        """Forget the streams of the weights, and hand out new ones from this index on."""
        self.streams, self._weights = stream, []


def _factors(module: Any, inside: bool = False) -> Iterator[nn.Parameter]:
    """The parameters whose names contain "lora_", in the order of `named_parameters`, which takes ten times as long."""
    for name, parameter in module._parameters.items():
        if parameter is not None and (inside or "lora_" in name):
            yield parameter
    for name, child in module._modules.items():
        if child is not None:
            yield from _factors(child, inside or "lora_" in name)
