"""Find the weights of a model and evaluate it at displaced weights, without writing a parameter.

The forward of a chosen layer is replaced inside a ``with`` block. The replacement builds the displaced weight of this
layer, runs the layer's own forward with it (`torch.func.functional_call`) and frees it: one displaced weight exists at
a time, whatever the size of the model. Since out = x (W + s B A)^T + b, adding D to the frozen W adds D to the merged
weight W' = W + s B A.

If D cannot be added to the base weight of a LoRA layer (a quantized weight; DoRA, which rescales the sum), the layer's
operation with D alone is added to its output, out + x D^T. LoRA layers are recognized by their methods
(`get_base_layer`, `get_delta_weight`, `active_adapters`), so this module does not import peft.

A weight with a parametrization of torch (weight_norm, spectral_norm, orthogonal) is the computed one, and the displaced
weight replaces it as one more parametrization, at the end: the parametrized tensors are not written.

Row form: each weight is viewed as (m, n), one row per output. The Conv1D of GPT-2 stores the transpose; the trailing
dimensions of a convolution are flattened.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized

from ..utils import arguments
from .options import Layers, check_space

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLAIN = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
CHUNK = 1 << 20  # number of entries of a temporary block

At = Callable[["Weight", Tensor], Tensor]  # (weight, its values in row form) -> displaced values in row form
Forward = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight that can be displaced.

    Attributes:
        name: of the layer, the same with and without the wrapper of peft.
        owner: the module whose forward is replaced.
        path: of the parameter, relative to `owner`; None if the displacement is added to the output instead.
        index: of the weight in the noise stream, a hash of `name`. It does not depend on the other chosen weights.
        transposed: the parameter is stored as (n, m).
        shape: (m, n), row form.
        full_shape: shape of the stored parameter.
    """

    name: str
    owner: nn.Module
    path: str | None
    index: int
    transposed: bool
    shape: tuple[int, int]
    full_shape: tuple[int, ...]

    def parameter(self) -> Tensor | None:
        """The stored parameter, or None for an additive weight; of a parametrized one, the computed weight."""
        if self.path is None:
            return None
        module, leaf = self._place(self.path)
        return cast("Tensor | None", module[leaf] if isinstance(module, nn.ParameterDict) else _read(module, leaf))

    def parametrizations(self) -> Any:
        """torch's list of the parametrizations of this weight, or None if it has none."""
        if self.path is None:
            return None
        module, leaf = self._place(self.path)
        return module.parametrizations[leaf] if is_parametrized(module, leaf) else None

    def _place(self, path: str) -> tuple[Any, str]:
        *parents, leaf = path.split(".")
        return self.owner.get_submodule(".".join(parents)), leaf

    def values(self) -> Tensor:
        """The values in row form, (m, n): a view of the parameter; zeros for an additive weight."""
        parameter = self.parameter()
        if parameter is None:
            like = next((p for p in self.owner.parameters() if p.is_floating_point()), torch.zeros(()))
            return torch.zeros((), dtype=like.dtype, device=like.device).expand(self.shape)
        parameter = parameter.detach()
        return parameter.T if self.transposed else parameter.flatten(1)

    def stored(self, rows: Tensor) -> Tensor:
        """Convert (m, n) rows to the shape of the stored parameter."""
        return rows.T if self.transposed else rows.view(self.full_shape)


def find_weights(model: nn.Module, layers: Layers = None, space: str = "merged") -> list[Weight]:
    """The weights to displace together.

    Args:
        model: any module.
        layers: None, the layers with an adapter, or all layers if none has one; "all", each `nn.Linear`,
            `nn.Conv1d/2d/3d`, `nn.Embedding`, `nn.MultiheadAttention` and Conv1D, adapted or not; or a function of
            the layer's name that selects among these. Biases and normalization layers are never displaced (Li et al.
            2018, arXiv 1712.09913, section 4).
        space: "merged", the weight W' of the layer; or "adapter", the factors A and B of the active adapters.

    Raises:
        ValueError: an unknown space or `layers`, no layer matched, or a layer whose weight cannot be displaced or is
            offloaded.
    """
    check_space("space", space)
    arguments.layers("layers", layers)
    modules = list(_layers(arguments.module("model", model)))
    adapted = [(name, module) for name, module in modules if is_adapted(module)]
    if space == "adapter" or (layers is None and adapted):
        modules = adapted
    if callable(layers):
        modules = [(name, module) for name, module in modules if layers(name)]
    make = _factor_weights if space == "adapter" else _merged_weights
    for name, module in modules:
        _check_present(name, module)
    found = [weight for name, module in modules for weight in make(name, module)]
    if not found:
        raise ValueError(
            f"no layer of {type(model).__name__} matched layers={layers!r} in space={space!r}: it must hold at least "
            + ("one active LoRA adapter" if space == "adapter" else "one linear, convolution or embedding layer")
        )
    return _share_tied(found)


def is_adapted(module: nn.Module) -> bool:
    """Whether this is an adapter layer of peft, with a base layer and an update of its weight."""
    return all(hasattr(module, name) for name in ("get_base_layer", "get_delta_weight", "active_adapters"))


def active(module: Any) -> list[str]:
    """Names of the adapters that this layer's forward applies; none if they are disabled or merged."""
    if not is_adapted(module) or module.disable_adapters or module.merged:
        return []
    held = [d for d in (getattr(module, n, {}) for n in getattr(module, "adapter_layer_names", ())) if len(d)]
    return [name for name in module.active_adapters if any(name in d for d in held)]


@contextlib.contextmanager
def displaced(weights: list[Weight], at: At) -> Iterator[set[str]]:
    """Run each forward of the chosen layers with ``at(weight, W)`` in place of W, both in row form.

    No parameter is written: it is replaced during one call of its layer, and the layer's forward inside the block. The
    tensor that `at` returns is part of the autograd graph, so gradients with respect to it can be taken.

    Yields:
        The names of the weights used so far.
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


class _Constant(nn.Module):
    """A parametrization whose weight is a given tensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = (weight,)  # in a tuple: never a parameter or buffer

    def forward(self, _: Tensor) -> Tensor:
        return self.weight[0]


@contextlib.contextmanager
def _parametrized_as(tensors: dict[Weight, Tensor]) -> Iterator[None]:
    """Give parametrized weights other values."""
    lists = [weight.parametrizations() for weight in tensors]
    for parts, tensor in zip(lists, tensors.values(), strict=True):
        parts.append(_Constant(tensor))
    try:
        yield
    finally:
        for parts in lists:
            del parts[-1]


def _read(module: Any, name: str) -> Any:
    """An attribute; a parametrized one in evaluation mode, since spectral_norm writes its buffers in training mode."""
    if not is_parametrized(module, name):
        return getattr(module, name, None)
    parts = module.parametrizations[name]
    modes = {part: part.training for part in parts.modules()}
    try:
        return parts.eval()()
    finally:
        for part, mode in modes.items():
            part.training = mode


class _Call(nn.Module):
    """A layer with its original forward."""

    def __init__(self, layer: nn.Module, run: Forward) -> None:
        super().__init__()
        self.layer, self.run = layer, run
        self.training = layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def _displaced_forward(run: Forward, owner: nn.Module, group: list[Weight], at: At, used: set[str]) -> Forward:
    call = _Call(owner, run)

    def forward(*args: Any, **kwargs: Any) -> Any:
        used.update(weight.name for weight in group)
        if group[0].path is None:
            (weight,) = group
            shift = _shift(owner, args[0], weight.stored(at(weight, weight.values())))
            out = run(*args, **kwargs)
            return out + shift.to(out.dtype)
        moved = {weight: weight.stored(at(weight, weight.values())) for weight in group}
        computed = {weight: moved.pop(weight) for weight in group if weight.parametrizations() is not None}
        with _parametrized_as(computed):
            return functional_call(call, {f"layer.{weight.path}": to for weight, to in moved.items()}, args, kwargs)

    return forward


def _shift(owner: Any, x: Tensor, D: Tensor) -> Tensor:
    """The change of the layer's output if D, of the shape of the stored weight, is added to the weight."""
    base = owner.get_base_layer()
    if isinstance(base, nn.Embedding):
        return nn.functional.embedding(x, D) * getattr(base, "embed_scale", 1)
    if isinstance(base, CONVOLUTIONS):
        out: Tensor = base._conv_forward(x, D.to(x.dtype), None)
        return out
    return nn.functional.linear(x, (D.T if is_transposed(base) else D).to(x.dtype))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of each layer that can be displaced, without the layers inside an adapter layer."""
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
    """The layer's name without the prefixes of wrappers."""
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name.split(".modules_to_save.")[0]


def is_transposed(module: nn.Module) -> bool:
    """Whether this is a Conv1D of transformers, which stores its weight as (n, m)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _check_present(name: str, module: nn.Module) -> None:
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            f"layer {name!r} ({type(module).__name__}): its weights must be in memory, got weights on the meta device: "
            "load the model without offloading (accelerate), or leave the layer out through layers="
        )


def _weight(name: str, owner: nn.Module, path: str, transposed: bool) -> Weight:
    made = Weight(name, owner, path, zlib.crc32(name.encode()), transposed, (0, 0), ())
    parameter = made.parameter()
    if parameter is None or not parameter.is_floating_point() or parameter.ndim < 2 or parameter.numel() == 0:
        kind = "missing" if parameter is None else f"{parameter.dtype}, shape {tuple(parameter.shape)}"
        raise ValueError(
            f"layer {name!r} ({type(owner).__name__}): {path} must be a whole floating-point matrix, got {kind}; "
            "leave the layer out through layers=, or gather or dequantize it first"
        )
    rows = parameter.T if transposed else parameter.flatten(1)
    return replace(made, shape=(rows.shape[0], rows.shape[1]), full_shape=tuple(parameter.shape))


def _merged_weights(name: str, module: Any) -> list[Weight]:
    if isinstance(module, nn.MultiheadAttention):
        if _read(module, "in_proj_weight") is None:
            raise ValueError(f"layer {name!r}: MultiheadAttention must have one in_proj_weight; leave it out (layers=)")
        paths = ("in_proj_weight", "out_proj.weight")
        return [_weight(f"{name}.{path}", module, path, False) for path in paths]
    if not is_adapted(module):
        return [_weight(name, module, "weight", is_transposed(module))]
    base = module.get_base_layer()
    parameter = _read(base, "weight")
    takes = parameter is not None and parameter.is_floating_point() and parameter.ndim > 1 and parameter.numel() > 0
    known = takes and (isinstance(base, PLAIN) or is_transposed(base)) and module.base_layer is base
    added = hasattr(module, "lora_A") and not any(adapter in _variants(module) for adapter in active(module))
    if known:
        weight = _weight(name, module, "base_layer.weight", is_transposed(base))
        return [weight if added else replace(weight, path=None)]
    m, n = getattr(base, "out_features", None), getattr(base, "in_features", None)
    if isinstance(m, int) and isinstance(n, int):  # the weight is not available: quantized, or wrapped itself
        return [Weight(name, module, None, zlib.crc32(name.encode()), False, (m, n), (m, n))]
    raise ValueError(
        f"layer {name!r}: a {type(module).__name__} over {type(base).__name__} cannot be displaced in the merged "
        "space; leave it out through layers=, or merge the adapter first"
    )


def _variants(module: nn.Module) -> set[str]:
    """Adapters whose update is not just added to the base weight."""
    dora = {name for name, on in getattr(module, "use_dora", {}).items() if on}
    return dora | set(getattr(module, "lora_variant", {}))


def _factor_weights(name: str, module: nn.Module) -> list[Weight]:
    found = []
    for position, adapter in enumerate(active(module)):
        tag = f".{position}" if position else ""  # the first of several has the name of a single one
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
    """Give tied weights the index of the first of them, and two names with the same hash different indices."""
    taken: dict[int, str] = {}
    tied: dict[int, int] = {}
    out = []
    for weight in weights:
        index, parameter = weight.index, weight.parametrizations() or weight.parameter()
        if parameter is not None and id(parameter) in tied:
            index = tied[id(parameter)]
        else:
            while taken.setdefault(index, weight.name) != weight.name:
                index = (index + 1) & 0xFFFFFFFF
            if parameter is not None:
                tied[id(parameter)] = index
        out.append(replace(weight, index=index))
    return out
