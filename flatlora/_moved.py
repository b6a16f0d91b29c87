"""Keep the module names of version 0.1 importable: `from flatlora.layer import flat_layers` and the like."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

MOVED = {
    "adoption": ["layers.convert", "layers.peft_door"],
    "analysis.evaluate": ["analysis.mean_loss", "analysis.journal", "analysis.table"],
    "analysis.files": ["analysis.serialization"],
    "analysis.norms": ["analysis.merged_norms"],
    "analysis.weights": ["analysis.displacement"],
    "arguments": ["utils.arguments"],
    "callback": ["integrations.callback"],
    "checkpoint": ["training.checkpoint"],
    "checks": ["training.diagnostics"],
    "compiled": ["layers.compiled"],
    "jsonfiles": ["utils.jsonfiles"],
    "layer": ["layers.flat_layer"],
    "merged": ["layers.merged", "layers.attention", "layers.experts"],
    "method": ["methods.base", "methods.flat_lora"],
    "methods.factors": ["methods.base"],
    "model": ["api"],
    "ops.adapted": ["ops.fused_lora"],
    "ops.library": ["ops.custom_ops"],
    "ops.merged": ["ops.inplace", "ops.products", "ops.checks"],
    "ops.operands": ["ops.checks"],
    "parts": ["training.model_parts"],
    "passes": ["training.forward_passes"],
    "quantised": ["layers.quantized"],
    "recompute": ["training.recompute"],
    "settings": ["config", "training.schedule"],
    "spread": ["layers.module_weights", "training.distributed"],
    "state": ["training.perturbation", "training.forward_records"],
    "steps": ["training.optimizer_steps"],
    "strength": ["training.schedule"],
    "support": ["layers.supported"],
    "transforms": ["layers.functorch"],
    "weights": ["layers.quantized_rows"],
}

RENAMED = {  # names whose spelling has changed
    "FactorMethod": "FactorOffset",
    "Passes": "ForwardPasses",
    "QUANTISED": "QUANTIZED",
    "Rows": "Matrix",
    "QuantisedLayer": "QuantizedLayer",
    "is_quantised": "is_quantized",
    "of_model": "listener_of",
    "quantised_row_norms": "quantized_row_norms",
}


class MovedModule(ModuleType):
    """An old module name, which finds its names in the modules that replaced it."""

    def __getattr__(self, name: str) -> Any:
        package, _, old = self.__name__.partition(".")
        for new in MOVED[old] if not name.startswith("__") else ():
            found = getattr(importlib.import_module(f"{package}.{new}"), RENAMED.get(name, name), self)
            if found is not self:
                return found
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


for _old in MOVED:
    _module = sys.modules[f"{__package__}.{_old}"] = MovedModule(f"{__package__}.{_old}")
    if "." not in _old:
        setattr(sys.modules[__package__], _old, _module)
