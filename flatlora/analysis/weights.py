"""Which weights are displaced, and how, without a weight being written.

A chosen layer's forward is swapped for the length of a ``with`` block. The swapped forward builds the displaced weight
of this one layer, runs the layer's own forward on it (`torch.func.functional_call`) and lets it go: one displaced
weight exists at a time, whatever the size of the model. Because out = x (W + s B A)^T + b, adding D to the frozen W
adds D to the merged weight W' = W + s B A.

A LoRA layer whose base weight cannot take D in its place (quantised; DoRA, which rescales the sum) gets D additively,
its layer's operation with D alone, out + x D^T. LoRA layers are recognised by what they offer (`get_base_layer`,
`get_delta_weight`, `active_adapters`), so nothing here imports peft.

Row form: every weight is seen as (m, n), one row per output filter. GPT-2's Conv1D stores the transpose; the trailing
axes of a convolution are flattened.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..utils import arguments
from .options import SPACES

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLAIN = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
CHUNK = 1 << 20  # entries of a temporary block

At = Callable[["Weight", Tensor], Tensor]  # (weight, its values in row form) -> displaced values in row form


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight that can be displaced.

    Attributes:
        name: of the layer, the same for a plain model and for a model that peft wrapped.
        owner: the module whose forward is swapped.
        path: of the parameter below `owner`; None where D is added to the output instead.
        index: of the weight in the noise stream, a hash of `name`: it does not depend on which others are chosen.
        transposed: the parameter is stored (n, m).
        shape: (m, n), row form.
        full_shape: in which the parameter is stored.
    """

    name: str
    owner: nn.Module
    path: str | None
    index: int
    transposed: bool
    shape: tuple[int, int]
    full_shape: tuple[int, ...]

    def parameter(self) -> Tensor | None:
        """The stored parameter, or None for an additive weight."""
        if self.path is None:
            return None
        *parents, leaf = self.path.split(".")
        module: Any = self.owner.get_submodule(".".join(parents))
        return module[leaf] if isinstance(module, nn.ParameterDict) else getattr(module, leaf)

    def values(self) -> Tensor:
        """The values in row form, (m, n), a view of the parameter; zeros for an additive weight."""
        parameter = self.parameter()
        if parameter is None:
            like = next((p for p in self.owner.parameters() if p.is_floating_point()), torch.zeros(()))
            return torch.zeros((), dtype=like.dtype, device=like.device).expand(self.shape)
        parameter = parameter.detach()
        return parameter.T if self.transposed else parameter.flatten(1)

    def stored(self, rows: Tensor) -> Tensor:
        """Row form back to the shape in which the parameter is stored."""
        return rows.T if self.transposed else rows.view(self.full_shape)


def find_weights(
    model: nn.Module, layers: str | Callable[[str], bool] | None = None, space: str = "merged"
) -> list[Weight]:
    """The weights that are displaced together.

    Args:
        model: any module.
        layers: None, the layers that carry an adapter, or all of them where none does; "all", every `nn.Linear`,
            `nn.Conv1d/2d/3d`, `nn.Embedding`, `nn.MultiheadAttention` and Conv1D, adapted or not; or a function of
            the layer's name that says which of these. Biases and normalisation are never displaced (Li et al. 2018,
            arXiv 1712.09913, section 4).
        space: "merged", the weight the layer acts with; or "adapter", the factors A and B of the active adapters.

    Raises:
        ValueError: an unknown space or `layers`, no layer matched, or a layer whose weight cannot be displaced.
    """
    arguments.choice("space", space, SPACES)
    arguments.layers("layers", layers)
    modules = list(_layers(arguments.module("model", model)))
    adapted = [(name, module) for name, module in modules if is_adapted(module)]
    if space == "adapter" or (layers is None and adapted):
        modules = adapted
    if callable(layers):
        modules = [(name, module) for name, module in modules if layers(name)]
    make = _factors if space == "adapter" else _merged
    found = [weight for name, module in modules for weight in make(name, module)]
    if not found:
        raise ValueError(
            f"no layer of {type(model).__name__} matched layers={layers!r} in space={space!r}: it must hold at least "
            + ("one active LoRA adapter" if space == "adapter" else "one linear, convolution or embedding layer")
        )
    return _share_tied(found)


def is_adapted(module: nn.Module) -> bool:
    """Whether this is an adapter layer: it wraps a base layer and knows the update it adds to its weight."""
    return all(hasattr(module, name) for name in ("get_base_layer", "get_delta_weight", "active_adapters"))


def active(module: Any) -> list[str]:
    """The adapters that act in this layer's forward beside its base weight; none when disabled or merged."""
    if not is_adapted(module) or module.disable_adapters or module.merged:
        return []
    held = [d for d in (getattr(module, n, {}) for n in getattr(module, "adapter_layer_names", ())) if len(d)]
    return [name for name in module.active_adapters if any(name in d for d in held)]


@contextlib.contextmanager
def displaced(weights: list[Weight], at: At) -> Iterator[set[str]]:
    """Inside, every forward of the chosen layers acts with ``at(weight, W)`` in place of W (both in row form).

    Nothing is written: a parameter is replaced for one call of its layer, the layer's forward for the length of the
    block. Whatever `at` returns is in the graph, so gradients with respect to it can be taken.

    Yields:
        The names of the weights that were used so far.
    """
    groups: dict[nn.Module, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(weight.owner, []).append(weight)
    used: set[str] = set()
    before = {owner: owner.__dict__.get("forward") for owner in groups}
    try:
        for owner, group in groups.items():
            owner.forward = _displaced_forward(owner.forward, owner, group, at, used)
        yield used
    finally:
        for owner, forward in before.items():
            owner.__dict__.pop("forward", None)
            if forward is not None:
                owner.forward = forward


class _Call(nn.Module):
    """A layer with the forward it had before it was swapped."""

    def __init__(self, layer: nn.Module, run: Callable) -> None:
        super().__init__()
        self.layer, self.run = layer, run
        self.training = layer.training

    def forward(self, *args, **kwargs):
        return self.run(*args, **kwargs)


def _displaced_forward(run: Callable, owner: nn.Module, group: list[Weight], at: At, used: set[str]) -> Callable:
    call = _Call(owner, run)

    def forward(*args, **kwargs):
        used.update(weight.name for weight in group)
        if group[0].path is None:
            (weight,) = group
            shift = _shift(owner, args[0], weight.stored(at(weight, weight.values())))
            out = run(*args, **kwargs)
            return out + shift.to(out.dtype)
        swap = {f"layer.{weight.path}": weight.stored(at(weight, weight.values())) for weight in group}
        return functional_call(call, swap, args, kwargs)

    return forward


def _shift(owner: Any, x: Tensor, D: Tensor) -> Tensor:
    """What the layer adds to its output when D, in the shape of its weight, is added to the weight."""
    base = owner.get_base_layer()
    if isinstance(base, nn.Embedding):
        return nn.functional.embedding(x, D) * getattr(base, "embed_scale", 1)
    if isinstance(base, CONVOLUTIONS):
        return base._conv_forward(x, D.to(x.dtype), None)  # type: ignore[arg-type]
    return nn.functional.linear(x, (D.T if is_transposed(base) else D).to(x.dtype))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer that can be displaced; what an adapter layer wraps is its own business."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("original_module") or any(name.startswith(outer) for outer in inside):
            continue
        whole = is_adapted(module) or isinstance(module, nn.MultiheadAttention)
        if whole:
            inside.append(f"{name}." if name else "")
        if whole or isinstance(module, PLAIN) or is_transposed(module):
            yield _canonical(name), module


def _canonical(name: str) -> str:
    """The layer's name without the prefixes that wrappers put before it."""
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name.split(".modules_to_save.")[0]


def is_transposed(module: Any) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _weight(name: str, owner: nn.Module, path: str, transposed: bool) -> Weight:
    made = Weight(name, owner, path, zlib.crc32(name.encode()), transposed, (0, 0), ())
    parameter = made.parameter()
    if parameter is None or not parameter.is_floating_point() or parameter.ndim < 2 or parameter.numel() == 0:
        kind = "missing" if parameter is None else f"{parameter.dtype}, shape {tuple(parameter.shape)}"
        raise ValueError(
            f"layer {name!r} ({type(owner).__name__}): {path} must be a whole floating-point matrix, got {kind}; "
            "leave the layer out through layers=, or gather or dequantise it first"
        )
    rows = parameter.T if transposed else parameter.flatten(1)
    return replace(made, shape=(rows.shape[0], rows.shape[1]), full_shape=tuple(parameter.shape))


def _merged(name: str, module: Any) -> list[Weight]:
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            raise ValueError(f"layer {name!r}: MultiheadAttention must have one in_proj_weight; leave it out (layers=)")
        paths = ("in_proj_weight", "out_proj.weight")
        return [_weight(f"{name}.{path}", module, path, False) for path in paths]
    if not is_adapted(module):
        return [_weight(name, module, "weight", is_transposed(module))]
    base = module.get_base_layer()
    parameter = getattr(base, "weight", None)
    takes = parameter is not None and parameter.is_floating_point() and parameter.ndim > 1 and parameter.numel() > 0
    known = takes and (isinstance(base, PLAIN) or is_transposed(base)) and module.base_layer is base
    added = hasattr(module, "lora_A") and not any(adapter in _variants(module) for adapter in active(module))
    if known:
        weight = _weight(name, module, "base_layer.weight", is_transposed(base))
        return [weight if added else replace(weight, path=None)]
    m, n = getattr(base, "out_features", None), getattr(base, "in_features", None)
    if isinstance(m, int) and isinstance(n, int):  # the weight is out of reach: quantised, or itself wrapped
        return [Weight(name, module, None, zlib.crc32(name.encode()), False, (m, n), (m, n))]
    raise ValueError(
        f"layer {name!r}: a {type(module).__name__} over {type(base).__name__} cannot be displaced in the merged "
        "space; leave it out through layers=, or merge the adapter first"
    )


def _variants(module: nn.Module) -> set[str]:
    """Adapters whose update is not simply added to the base weight."""
    dora = {name for name, on in getattr(module, "use_dora", {}).items() if on}
    return dora | set(getattr(module, "lora_variant", {}))


def _factors(name: str, module: nn.Module) -> list[Weight]:
    found = []
    for position, adapter in enumerate(active(module)):
        tag = f".{position}" if position else ""  # several at once: the first is named as one alone would be
        for factor in ("A", "B"):
            if adapter in getattr(module, f"lora_{factor}", {}):
                held = getattr(module, f"lora_{factor}")
                path = f"lora_{factor}.{adapter}" + ("" if isinstance(held, nn.ParameterDict) else ".weight")
            elif adapter in getattr(module, f"lora_embedding_{factor}", {}):
                path = f"lora_embedding_{factor}.{adapter}"
            else:
                raise ValueError(f"layer {name!r}: adapter {adapter!r} has no factor lora_{factor}; leave it out")
            found.append(_weight(f"{name}.lora_{factor}{tag}", module, path, False))
    return found


def _share_tied(weights: list[Weight]) -> list[Weight]:
    """Tied weights are one weight: they get the noise of the first. Two names with one hash get two indices."""
    taken: dict[int, str] = {}
    tied: dict[int, int] = {}
    out = []
    for weight in weights:
        index, parameter = weight.index, weight.parameter()
        if parameter is not None and id(parameter) in tied:
            index = tied[id(parameter)]
        else:
            while taken.setdefault(index, weight.name) != weight.name:
                index = (index + 1) & 0xFFFFFFFF
            if parameter is not None:
                tied[id(parameter)] = index
        out.append(replace(weight, index=index))
    return out
