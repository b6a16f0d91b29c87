"""Make a layer of peft flat, and plain again; what it does when peft merges, extends, copies or unloads it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

from peft.tuners.lora import layer as lora
from torch import nn

from ..config import PerturbedLoraConfig
from ..ops.registry import unregister
from ..training.distributed import name_without_fsdp1
from ..training.perturbation import Perturbation, check_same_settings
from . import exact_merge, tensor_parallel
from .attention import AttentionLayer
from .experts import ExpertsLayer
from .flat_layer import OWN_ATTRIBUTES, FlatLayer, flat_layers
from .quantized import QuantizedLayer
from .row_norms import NormCache
from .supported import is_quantized, unsupported


def make_flat(layer: Any, adapter: str, perturbation: Perturbation, rho: float, on_unsupported: str, name: str) -> bool:
    """Make `adapter` flat in a LoRA layer, in place.

    Returns:
        True if the layer is perturbed from now on; False if it cannot be and `on_unsupported` is "warn".

    Raises:
        ValueError: it cannot be perturbed, and `on_unsupported` is "error".
    """
    method = perturbation.settings.method
    tensor_parallel.declare_widths(layer, adapter)
    reason = tensor_parallel.unsupported(layer, adapter, method)
    reason = reason or unsupported(layer, adapter) or method.unsupported(layer, adapter)
    if reason is None:
        perturbation.rhos[adapter] = rho
        for part in _parts(layer):
            _convert(part, perturbation)
            part.flat_adapters.add(adapter)
            part.strict = on_unsupported == "error"
            method.init_adapter(part, adapter, perturbation)
        return True
    message = f"the layer {name!r} ({type(layer).__name__}) cannot be perturbed: {reason}."
    if on_unsupported == "error":
        raise ValueError(
            f"{message} Leave it out of target_modules, or set on_unsupported='warn' to train it without noise."
        )
    warnings.warn(f"{message} It is trained without noise (on_unsupported='warn').", stacklevel=2)
    return False


def undo_make_flat(layer: FlatPeftLayer, adapter: str) -> None:
    """Undo `make_flat` of this adapter. With its last flat adapter gone, the layer is peft's again."""
    layer.forget(adapter)
    if not layer.flat_adapters:
        make_plain(layer)


def make_plain(layer: FlatLayer) -> None:
    """Make a flat layer peft's again, with nothing of this library on it."""
    unregister(layer.__dict__.get("number", 0))
    layer.perturbation.registry.remove([layer])
    peft_class: Any = layer.peft_class
    for name in OWN_ATTRIBUTES:
        layer.__dict__.pop(name, None)
    layer.__class__ = peft_class


def release(perturbation: Perturbation, leaving: list[FlatLayer], model: nn.Module | None = None) -> None:
    """Drop what the layers that stay flat do not need: hooks at other modules, and strengths of other adapters.

    Args:
        leaving: layers that have left the registry, and may still be in the model.
        model: a model in which hooks may have come with a copy of a part.
    """
    _drop_strengths(perturbation)
    passes = perturbation.passes
    watched = passes.watched()
    kept = [module for module in watched if any(layer not in leaving for layer in flat_layers(module))]
    if model is not None or len(kept) < len(watched):
        passes.close(model)
        for module in kept:
            passes.watch(module)


def _drop_strengths(perturbation: Perturbation) -> None:
    # the parts of a model share the strength of adapters of one name
    used = {adapter for layer in perturbation.registry.alive() for adapter in layer.flat_adapters}
    for adapter in perturbation.rhos.keys() - used:
        del perturbation.rhos[adapter]


def _parts(layer: Any) -> list[Any]:
    """The layer, and the layers that become flat with it: attention adapts its out_proj by a layer inside."""
    is_attention = isinstance(layer, lora.MultiheadAttention)
    return [layer, layer.get_base_layer().out_proj] if is_attention else [layer]


def _convert(layer: Any, perturbation: Perturbation) -> None:
    if not isinstance(layer, FlatLayer):
        layer.__dict__.update(perturbation=perturbation, flat_adapters=set(), offsets={}, _norms=NormCache())
        peft_class: Any = type(layer)
        layer.__class__ = flat_class(peft_class)
        layer.__dict__["stream"] = perturbation.registry.stream_of(layer.anchor())
        layer.remember_base()
        layer.enroll()


class FlatPeftLayer(FlatLayer):
    """A flat layer under peft's operations."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        # peft writes through .data, which changes no version counter
        self._norms.clear()
        with exact_merge.recorded(self):
            super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        self._norms.clear()
        with exact_merge.restored(self):
            super().unmerge()

    # peft calls it with keywords only
    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:  # type: ignore[override]
        from .peft_door import as_lora_config

        self._norms.clear()
        with as_lora_config(config):
            super().update_layer(adapter_name, *args, config=config, **kwargs)  # type: ignore[misc]  # the same
        # not so for a layer inside this one, which becomes flat with it
        if isinstance(config, PerturbedLoraConfig):
            check_same_settings(self.perturbation, config.settings())
            name = kwargs.get("target_name", "?")
            make_flat(self, adapter_name, self.perturbation, config.rho, config.on_unsupported, name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The modules with their names in one process.

        peft looks up by name what an adapter saves and loads, and FSDP1's wrappers add names that are in no state dict.
        """
        modules: Iterator[tuple[str, nn.Module]]
        modules = super().named_modules(memo, name_without_fsdp1(prefix), remove_duplicate)
        return modules

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.forget(adapter_name)

    def forget(self, adapter: str) -> None:
        """Keep nothing of this adapter's perturbation."""
        self.flat_adapters.discard(adapter)
        self.offsets = {key: offset for key, offset in self.offsets.items() if key[1] != adapter}
        _drop_strengths(self.perturbation)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """peft's method for layers that unload in their own way. Here it removes the hooks with the last flat layer."""
        perturbation, inside = self.perturbation, list(flat_layers(self))
        model = perturbation.model
        last = model is None or all(layer in inside for layer in flat_layers(model))
        own = getattr(super(), "unload_and_optionally_merge_module", None)
        base: nn.Module
        if own is not None:
            base = own(merge=merge, safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            if merge:
                # nothing is kept: it will not be unmerged
                super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            base = self.get_base_layer()
        perturbation.registry.remove([self, *inside])
        if last:
            perturbation.close()
        elif perturbation.registry.is_joined:
            release(perturbation, [self, *inside])
        return base

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        self.enroll()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class is created at run time, so a pickle names what it is created from. Cached norms have weak references
        state = {**self.__dict__, "_norms": NormCache()}
        state.pop("lock", None)
        return _recreate, (self.peft_class,), state

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica: nn.Module = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]  # torch's
        # the replica runs in another thread
        replica.__dict__["user_thread"] = threading.get_ident()
        return replica


@cache
def flat_class(peft_class: type) -> type[FlatPeftLayer]:
    """The class of a flat layer over a class of peft."""
    kinds: dict[type, type] = {lora.MultiheadAttention: AttentionLayer, lora.ParamWrapper: ExpertsLayer}
    kind = QuantizedLayer if is_quantized(peft_class) else kinds.get(peft_class, FlatLayer)
    bases = (FlatPeftLayer, peft_class) if kind is FlatLayer else (FlatPeftLayer, kind, peft_class)
    # peft recognizes its ParamWrapper by the name of the class
    name = peft_class.__name__ if peft_class is lora.ParamWrapper else f"Flat{peft_class.__name__}"
    return type(name, bases, {"peft_class": peft_class, "__module__": __name__})


def _recreate(peft_class: type) -> nn.Module:
    return object.__new__(flat_class(peft_class))
