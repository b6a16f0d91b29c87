"""Parameters that peft adapts without a module (experts of a mixture), by a parametrization for the length of a call.

eps is added by one more parametrization. The row norms are those of each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from .merged import MergedLayer
from .module_weights import AppliedFunction, attributes, refuse_fsdp1
from .weights import LayerWeights


class ExpertsWeights(LayerWeights):
    """W, A and B of an adapted parameter."""

    __slots__ = ()

    @property
    def anchor(self) -> Any:
        layer: Any = self.layer
        return layer.get_param()


class ExpertsLayer(MergedLayer):
    """A flat `lora.ParamWrapper`: a parameter that is a matrix, or a stack of matrices, one for each expert."""

    weights_class: ClassVar[type[LayerWeights]] = ExpertsWeights

    def noisy_forward(self, peft_forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        factors = [self.lora_A[name] for name in self.active_lora_adapters()]
        refuse_fsdp1("An expert parameter", factors, "Use FSDP2 or ZeRO-3.")
        wrapper: Any = self
        base: Any = self.get_base_layer()
        transposed = (
            getattr(wrapper, "_param_ndim", wrapper.get_param().ndim) == 3 and not wrapper._did_swap_in_out_features
        )
        key, _ = self.perturbation.draw(wrapper.get_param().device)

        @contextmanager
        def activate(active_adapters: list[str]) -> Iterator[None]:
            with self.peft_class._activate_lora(self, active_adapters):  # type: ignore[attr-defined]  # peft's
                parts = base.parametrizations[wrapper.parameter_name]
                parts.append(AppliedFunction(lambda weight: self.add_noise(weight, key, self.stream, transposed)))
                try:
                    yield
                finally:
                    del parts[-1]

        with attributes(self, _activate_lora=activate):
            return peft_forward(x, *args, **kwargs)
