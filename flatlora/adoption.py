"""How a layer that peft made becomes flat, and what it does when peft merges, extends or unloads it."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

import peft
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .layer import OWN_ATTRIBUTES, FlatLayer, flat_layers
from .merged import AttentionLayer, ExpertsLayer
from .ops.registry import unregister
from .quantised import QuantisedLayer
from .spread import name_in_one_process
from .state import Perturbation, check_same_settings
from .support import is_quantised, unsupported

_PEFT = os.path.dirname(peft.__file__)


def create_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module:
    """The layer that peft would have made for `target`, made flat: `FlatLoraConfig` registers this with peft.

    Raises:
        ValueError: the layer cannot be perturbed and `config.on_unsupported` is "error".
    """
    tuner = _calling_tuner()
    with _as_plain(config):
        layer = LoraModel._create_new_module(config, adapter_name, target, **kwargs)
    state = Perturbation.shared(tuner.model, config.settings())
    state.passes.watch(tuner)
    adopt(layer, adapter_name, state, config.rho, config.on_unsupported, kwargs.get("target_name", adapter_name))
    return layer


def adopt(layer: Any, adapter: str, state: Perturbation, rho: float, on_unsupported: str, name: str) -> bool:
    """Make `adapter` flat in a LoRA layer, in place; where that cannot be done, answer as `on_unsupported` says.

    Returns:
        True if the layer is perturbed from now on.

    Raises:
        ValueError: it cannot be, and `on_unsupported` is "error".
    """
    reason = unsupported(layer, adapter) or state.settings.method.unsupported(layer, adapter)
    if reason is None:
        state.rhos[adapter] = rho
        for part in _parts(layer):
            _make_flat(part, state)
            part.flat_adapters.add(adapter)
            part.strict = on_unsupported == "error"
            state.settings.method.adopt(part, adapter)
        return True
    message = f"the layer {name!r} ({type(layer).__name__}) cannot be perturbed: {reason}."
    if on_unsupported == "error":
        raise ValueError(
            f"{message} Leave it out of target_modules, or set on_unsupported='warn' to train it without noise."
        )
    warnings.warn(f"{message} It is trained without noise (on_unsupported='warn').", stacklevel=2)
    return False


def _parts(layer: Any) -> list[Any]:
    """The layer, and what becomes flat with it: attention adapts its out_proj by a layer inside."""
    attention = isinstance(layer, lora.MultiheadAttention)
    return [layer, layer.get_base_layer().out_proj] if attention else [layer]


def _make_flat(layer: Any, state: Perturbation) -> None:
    if not isinstance(layer, FlatLayer):
        layer.__dict__.update(perturbation=state, flat_adapters=set(), offsets={}, _norms={})
        layer.__class__ = flat_class(type(layer))  # type: ignore[arg-type]
        layer.__dict__["stream"] = state.stream_of(layer.anchor())
        layer.remember_base()
        layer._enrol()


def abandon(layer: Any, adapter: str) -> None:
    """Undo `adopt` of this adapter: with the last one the layer is again what peft made."""
    layer.forget(adapter)
    if not layer.flat_adapters:
        release(layer)


def release(layer: Any) -> None:
    """The layer is again what peft made, and nothing of ours stays on it."""
    plain = layer.plain_class
    unregister(layer.__dict__.get("number", 0))
    for name in OWN_ATTRIBUTES:
        layer.__dict__.pop(name, None)
    layer.__class__ = plain


def _calling_tuner() -> BaseTuner:
    """The tuner that is injecting layers just now.

    peft hands a custom-module factory the target and no more, but the layers of a model share their state, and where
    a pass begins is seen on the model. So the caller is asked: the nearest frame of peft's up the stack whose `self` is
    a tuner. Locals of other frames are not read, which would keep them alive.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PEFT) and frame.f_code.co_varnames[:1] == ("self",):
            tuner = frame.f_locals["self"]
            if isinstance(tuner, BaseTuner):
                return tuner
        frame = frame.f_back
    raise RuntimeError("FlatLoraConfig makes layers only for a peft tuner (get_peft_model, inject_adapter_in_model)")


@contextmanager
def _as_plain(config: Any) -> Iterator[None]:
    """A FlatLoraConfig as the LoraConfig that it extends, for as long as peft builds a layer from it."""
    flat, custom = type(config), config._custom_modules
    if not hasattr(config, "make_method"):
        yield
        return
    config.__class__ = LoraConfig
    config._custom_modules = {key: value for key, value in (custom or {}).items() if value is not create_layer}
    try:
        yield
    finally:
        config.__class__, config._custom_modules = flat, custom


class AdoptedLayer(FlatLayer):
    """A flat layer in peft's hands."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self._norms.clear()  # peft writes through .data, which no version counter sees
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        self._norms.clear()
        super().unmerge()

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        self._norms.clear()
        with _as_plain(config):
            super().update_layer(adapter_name, *args, config=config, **kwargs)
        if hasattr(config, "make_method"):  # not so in a layer inside of this one, which is adopted with it
            check_same_settings(self.perturbation, config.settings())
            state = self.perturbation
            adopt(self, adapter_name, state, config.rho, config.on_unsupported, kwargs.get("target_name", "?"))

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator:
        """The layer has the name that it has in one process: peft looks by name for what an adapter saves and loads,
        and FSDP1 puts the names of its wrappers in between, which are in no state dict."""
        return super().named_modules(memo, name_in_one_process(prefix), remove_duplicate)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.forget(adapter_name)

    def forget(self, adapter: str) -> None:
        """Keep nothing more of this adapter's perturbation."""
        self.flat_adapters.discard(adapter)
        self.offsets = {key: offset for key, offset in self.offsets.items() if key[1] != adapter}
        self.perturbation.rhos.pop(adapter, None)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """peft's door for layers that unload in their own way; ours lets the model's hooks go with the last layer."""
        state, inside = self.perturbation, list(flat_layers(self))
        model = state.model
        last = model is None or all(layer in inside for layer in flat_layers(model))
        own = getattr(super(), "unload_and_optionally_merge_module", None)
        if own is not None:
            base = own(merge=merge, safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            if merge:
                self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            base = self.get_base_layer()
        state.drop([self, *inside])
        if last:
            state.close()
        return base

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enrol()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the class is made at run time, so by its recipe; what is cached holds weak references, a lock is of a process
        state = {**self.__dict__, "_norms": {}}
        state.pop("lock", None)
        return _rebuild, (self.plain_class,), state

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["user_thread"] = threading.get_ident()  # it runs in another one
        return replica


@cache
def flat_class(plain: type) -> type:
    """The class of a flat layer over the class that peft gave it."""
    kinds: dict[type, type] = {lora.MultiheadAttention: AttentionLayer, lora.ParamWrapper: ExpertsLayer}
    kind: type = QuantisedLayer if is_quantised(plain) else kinds.get(plain, FlatLayer)
    bases = (AdoptedLayer, plain) if kind is FlatLayer else (AdoptedLayer, kind, plain)
    name = plain.__name__ if plain is lora.ParamWrapper else f"Flat{plain.__name__}"  # peft knows wrappers by that name
    return type(name, bases, {"plain_class": plain, "__module__": __name__})


def _rebuild(plain: type) -> nn.Module:
    return object.__new__(flat_class(plain))
