"""Layers for which peft makes the merged weight W + sBA itself, as a whole: attention and experts.

| what is adapted                        | how eps enters                                                           |
|----------------------------------------|--------------------------------------------------------------------------|
| torch's MultiheadAttention             | peft merges in_proj and out_proj around each call: eps is added to what  |
|                                        | it has merged. The frozen weights are put aside and put back, bit for    |
|                                        | bit, where peft subtracts again; after clean calls too                   |
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
from torch import Tensor

from .layer import FlatLayer
from .ops import add_noise_
from .ops.inplace import matrices
from .ops.norms import row_norms
from .spread import Applied, attributes, refuse_fsdp1


class MergedLayer(FlatLayer):
    """A flat layer whose merged weight is a tensor."""

    def _add_noise(self, weight: Tensor, key: Tensor, stream: int, transposed: bool = False) -> Tensor:
        rows = matrices(weight.detach(), transposed)
        norms = torch.cat([row_norms(matrix) for matrix in rows])
        row_std = self._row_std(norms, rows[0].shape[1])
        backend = self.perturbation.settings.backend
        return add_noise_(weight, row_std, key, stream, transposed=transposed, backend=backend)

    def _one_adapter(self) -> None:
        return None


class AttentionLayer(MergedLayer):
    """A flat `lora.MultiheadAttention`. Its out_proj is a flat layer too, for its stream and its adapters' sake; its
    forward never runs.

    peft merges into a new weight for each call, and subtracts again: in half precision W then moves a little with each
    call. Here the frozen weight is put back, after clean calls too, so that the output is that of peft's first call and
    W keeps its bits. With rho = 0 the layer is peft's in all, the subtraction included.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.perturbation.passes.note_layer(self.get_base_layer().out_proj.number)
        if self._strength() == 0 or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        return self._and_put_back(super().forward, x, *args, **kwargs)

    @torch.compiler.disable  # peft's merging would be cut into pieces between which W is not itself
    def _and_put_back(self, forward: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        frozen = [(module, name, dict(module._parameters)) for module, name, _ in self._places()]

        def put_back() -> None:
            for module, name, parameters in frozen:
                module.__dict__.pop(name, None)
                module._parameters.clear()
                module._parameters.update(parameters)
            for part in self.parts():
                part.merged_adapters.clear()

        with attributes(self, unmerge=put_back):
            try:
                return forward(x, *args, **kwargs)
            except BaseException:  # peft does not unmerge then
                put_back()
                raise

    def with_noise(self, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        places = self._places()
        key, _ = self.perturbation.draw(places[0][0].in_proj_weight.device)

        def merge(**options: Any) -> None:
            self.plain_class.merge(self, **options)  # type: ignore[attr-defined]
            for module, name, stream in places:
                setattr(module, name, self._add_noise(getattr(module, name), key, stream))

        with attributes(self, merge=merge):
            return plain(x, *args, **kwargs)

    def _places(self) -> list[tuple[Any, str, int]]:
        """(module, name of its weight, noise stream) of what is adapted."""
        base = self.get_base_layer()
        return [(base, "in_proj_weight", self.stream), (base.out_proj.get_base_layer(), "weight", base.out_proj.stream)]

    def parts(self) -> list[Any]:
        return [self, self.get_base_layer().out_proj]

    def _note_run(self) -> None:
        super()._note_run()
        self.get_base_layer().out_proj._note_run()

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
                parts.append(Applied(lambda weight: self._add_noise(weight, key, self.stream, transposed)))
                try:
                    yield
                finally:
                    del parts[-1]

        with attributes(self, _activate_lora=activate):
            return plain(x, *args, **kwargs)

    def anchor(self) -> Any:
        return self.get_param()
