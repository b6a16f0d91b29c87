"""How peft creates layers: its custom-module factory, the tuner that calls it, and the configuration that it reads.

A change in peft's internals changes this file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import peft
from peft.tuners.lora import LoraModel
from peft.tuners.lora.config import LoraConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..config import PerturbedLoraConfig, create_layer
from ..training.perturbation import Perturbation
from .convert import make_flat
from .tensor_parallel import check_config

_PEFT_FOLDER = os.path.dirname(peft.__file__)


def create_flat_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module:
    """The layer that peft creates for `target`, made flat. peft calls it through `config.create_layer`.

    Raises:
        ValueError: the layer cannot be perturbed, and `config.on_unsupported` is "error".
    """
    tuner = _calling_tuner()
    name = kwargs.get("target_name", adapter_name)
    check_config(target, config, name)
    with as_lora_config(config):
        create: Any = LoraModel._create_new_module
        layer: nn.Module = create(config, adapter_name, target, **kwargs)
    perturbation = Perturbation.shared(tuner.model, config.settings())
    perturbation.passes.watch(tuner)
    make_flat(layer, adapter_name, perturbation, config.rho, config.on_unsupported, name)
    return layer


@contextmanager
def as_lora_config(config: Any) -> Iterator[None]:
    """Inside, a configuration of ours is the LoraConfig that it extends, with the same values.

    peft changes the configuration while it builds a layer from it (patterns, initialization), so a copy would not do.
    It also looks for variants in the fields of the class, see `config.OnlyFlatLayers`, and for custom modules, which
    would lead back here. So class and custom modules are changed for that time.
    """
    if not isinstance(config, PerturbedLoraConfig):
        yield
        return
    own_class, custom = type(config), config._custom_modules
    config.__class__ = LoraConfig  # type: ignore[assignment]  # see above
    config._custom_modules = {key: value for key, value in (custom or {}).items() if value is not create_layer}
    try:
        yield
    finally:
        config.__class__, config._custom_modules = own_class, custom


def _calling_tuner() -> BaseTuner:
    """The tuner that is injecting layers.

    peft passes the target to a custom-module factory and nothing of the model, but the layers of a model share their
    perturbation, and hooks on the model see where a pass begins. So the tuner is taken from the call stack: the nearest
    frame of peft whose `self` is one. The locals of other frames are not read, because that keeps them alive.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PEFT_FOLDER) and frame.f_code.co_varnames[:1] == ("self",):
            tuner = frame.f_locals["self"]
            if isinstance(tuner, BaseTuner):
                return tuner
        frame = frame.f_back
    raise RuntimeError("FlatLoraConfig creates layers only for a peft tuner (get_peft_model, inject_adapter_in_model)")
