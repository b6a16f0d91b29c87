"""torch's MultiheadAttention, for which peft merges in_proj and out_proj around each call.

eps is added to what peft has merged. In half precision peft's merging and subtracting would move W a little with each
call. Here the frozen weights are put back, bit for bit, instead of the subtraction, after clean calls too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .flat_layer import FlatLayer
from .merged import MergedLayer
from .module_weights import attributes
from .weights import LayerWeights


class AttentionWeights(LayerWeights):
    """W, A and B of torch's MultiheadAttention."""

    __slots__ = ()

    @property
    def anchor(self) -> Any:
        return self.base.in_proj_weight


class AttentionLayer(MergedLayer):
    """A flat `lora.MultiheadAttention`.

    Its out_proj is a flat layer too, which has its own stream and adapters and whose forward never runs. With rho = 0
    the layer is peft's, with the subtraction.
    """

    weights_class: ClassVar[type[LayerWeights]] = AttentionWeights

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.perturbation.passes.note_layer(self._out_proj().number)
        if self.is_switched_off():
            return super().forward(x, *args, **kwargs)
        return self._forward_and_put_back(super().forward, x, *args, **kwargs)

    # the compiler would cut peft's merging into graphs between which W is not itself
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def _forward_and_put_back(self, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        frozen = [(module, name, dict(module._parameters)) for module, name, _ in self._places()]

        def put_back() -> None:
            for module, name, parameters in frozen:
                module.__dict__.pop(name, None)
                module._parameters.clear()
                module._parameters.update(parameters)
            for part in self.merged_parts():
                part.merged_adapters.clear()

        with attributes(self, unmerge=put_back):
            try:
                return forward(x, *args, **kwargs)
            except BaseException:  # peft does not unmerge then
                put_back()
                raise

    def noisy_forward(self, peft_forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        places = self._places()
        key, _ = self.perturbation.draw(places[0][0].in_proj_weight.device)

        def merge(**options: Any) -> None:
            self.peft_class.merge(self, **options)  # type: ignore[attr-defined]  # peft's
            for module, name, stream in places:
                setattr(module, name, self.add_noise(getattr(module, name), key, stream))

        with attributes(self, merge=merge):
            return peft_forward(x, *args, **kwargs)

    def merged_parts(self) -> list[FlatLayer]:
        return [self, self._out_proj()]

    def note_run(self) -> None:
        super().note_run()
        self._out_proj().note_run()

    def _places(self) -> list[tuple[Any, str, int]]:
        """(module, name of its weight, noise stream) of in_proj and out_proj."""
        out_proj = self._out_proj()
        in_proj = (self.get_base_layer(), "in_proj_weight", self.stream)
        return [in_proj, (out_proj.get_base_layer(), "weight", out_proj.stream)]

    def _out_proj(self) -> Any:
        base: Any = self.get_base_layer()
        return base.out_proj
