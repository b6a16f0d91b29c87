"""Layers for which peft makes the merged weight W + sBA itself, as a whole: attention and experts.

| what is adapted                        | how eps enters                                                           |
|----------------------------------------|--------------------------------------------------------------------------|
| torch's MultiheadAttention             | peft merges in_proj and out_proj around each call: eps is added to what  |
|                                        | it has merged. The frozen weights are put aside and put back, bit for    |
|                                        | bit, where peft subtracts again                                          |
| parameters (experts of a mixture)      | peft parametrizes them for the length of the call; eps comes after. The  |
|                                        | row norms are those of each expert                                       |

The merged weight is of the size of W, and autograd keeps it: that is peft's cost. Ours is a block of rows, since eps is
added in place; the row norms come from the merged weight as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layer import FlatLayer
from .ops import add_noise_, squared_row_norms
from .ops.merged import matrices
from .spread import refuse_fsdp1


class MergedLayer(FlatLayer):
    """A flat layer whose merged weight is a tensor."""

    def _add_noise(self, weight: Tensor, key: Tensor, stream: int, transposed: bool = False) -> Tensor:
        rows = matrices(weight.detach(), transposed)
        norms = torch.cat([squared_row_norms(matrix) for matrix in rows]).sqrt()
        row_std = self._row_std(norms, rows[0].shape[1])
        backend = self.perturbation.settings.backend
        return add_noise_(weight, row_std, key, stream, transposed=transposed, backend=backend)

    def _one_adapter(self) -> None:
        return None


class AttentionLayer(MergedLayer):
    """A flat `lora.MultiheadAttention`. Its out_proj is a flat layer too, for its stream and its adapters' sake; its
    forward never runs."""

    def with_noise(self, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        out_proj = base.out_proj
        key, _ = self.perturbation.draw(base.in_proj_weight.device)
        places = [(base, "in_proj_weight", self.stream), (out_proj.get_base_layer(), "weight", out_proj.stream)]
        frozen = [dict(module._parameters) for module, _, _ in places]

        def merge(**options: Any) -> None:
            self.plain_class.merge(self, **options)  # type: ignore[attr-defined]
            for module, name, stream in places:
                setattr(module, name, self._add_noise(getattr(module, name), key, stream))

        def put_back() -> None:
            for (module, name, _), parameters in zip(places, frozen, strict=True):
                module.__dict__.pop(name, None)
                module._parameters.clear()
                module._parameters.update(parameters)
            self.merged_adapters.clear()
            out_proj.merged_adapters.clear()

        with _instead(self, merge=merge, unmerge=put_back):
            return plain(x, *args, **kwargs)

    def parts(self) -> list[Any]:
        return [self, self.get_base_layer().out_proj]

    def _note_run(self) -> None:
        super()._note_run()
        self.get_base_layer().out_proj._note_run()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.perturbation.passes.note_layer(self.get_base_layer().out_proj.number)
        return super().forward(x, *args, **kwargs)

    def anchor(self) -> Any:
        return self.get_base_layer().in_proj_weight


class ExpertsLayer(MergedLayer):
    """A flat `lora.ParamWrapper`: a parameter that is a matrix, or a stack of them, one for each expert."""

    def with_noise(self, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        refuse_fsdp1("An expert parameter", [self.lora_A[name] for name in self._active()], "Use FSDP2 or ZeRO-3.")
        base, transposed = self.get_base_layer(), self._param_ndim == 3 and not self._did_swap_in_out_features
        key, _ = self.perturbation.draw(self.get_param().device)

        @contextmanager
        def activate(active_adapters: list[str]) -> Iterator[None]:
            with self.plain_class._activate_lora(self, active_adapters):  # type: ignore[attr-defined]
                parts = base.parametrizations[self.parameter_name]
                parts.append(_Applied(lambda weight: self._add_noise(weight, key, self.stream, transposed)))
                try:
                    yield
                finally:
                    del parts[-1]

        with _instead(self, _activate_lora=activate):
            return plain(x, *args, **kwargs)

    def anchor(self) -> Any:
        return self.get_param()


class _Applied(nn.Module):
    """A function as a parametrization."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


@contextmanager
def _instead(layer: Any, **methods: Callable) -> Iterator[None]:
    """The layer has these methods in place of its own for the time being."""
    layer.__dict__.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del layer.__dict__[name]
