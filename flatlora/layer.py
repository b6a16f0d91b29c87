"""One adapted layer: its weight, its row norms, and the forward at W + sBA + eps.

A layer that peft made keeps its class and gets `FlatLayer` in front of it, so `isinstance` and everything peft does
with it go on as before. A forward that is not to be perturbed is peft's own forward, untouched.

| what is adapted                          | how eps enters                                                      |
|------------------------------------------|---------------------------------------------------------------------|
| Linear, Conv1D, Conv1d/2d/3d             | the base product is computed once, with W + eps in place of W       |
| the same with DoRA                       | x eps^T is added: DoRA rescales the base product, and its magnitude |
|                                          | would otherwise receive the gradient of the noise                   |
| Embedding                                | the rows of eps that were looked up are added                       |
"""

from __future__ import annotations

import itertools
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraModel, variants
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import BlockDiagonalLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .method import FlatLora
from .ops import merged_row_norms, perturbed_conv, perturbed_linear, row_noise, squared_row_norms
from .ops.norms import grouped_row_norms, norm_dtype
from .spread import is_dtensor, replaced_forward, whole_weight
from .state import Perturbation

# What they add to the base product is B A x, or tends to it; DoRA's is another matter, see above.
VARIANTS = (
    variants.ALoraLinearVariant,  # merged from the invocation on: the row norm is that of the merged weight
    variants.BdLoraLinearVariant,
    variants.DoraLinearVariant,
    variants.DoraConv1dVariant,
    variants.DoraConv2dVariant,
    variants.DoraConv3dVariant,
    variants.KasaLinearVariant,
    variants.MiCAEmbeddingVariant,
    variants.MiCALinearVariant,
    variants.MontecloraLinearVariant,  # its own noise in A has mean zero, and is not in the row norm
    variants.VeloraLinearVariant,
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SPLIT = "its weight is split by tensor parallelism, and the row norms of a part are not those of the whole"
STOCK_FORWARDS = {kind.forward for kind in (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)}


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
        if not isinstance(layer, FlatLayer):
            stream = state.stream_of(layer.get_base_layer().weight)
            layer.__dict__.update(perturbation=state, stream=stream, flat_adapters=set(), offsets={}, _norms={})
            layer.__class__ = flat_class(type(layer))  # type: ignore[arg-type]
            layer._enrol()
        layer.flat_adapters.add(adapter)
        state.rhos[adapter] = rho
        state.settings.method.adopt(layer, adapter)
        return True
    message = f"the layer {name!r} ({type(layer).__name__}) cannot be perturbed: {reason}."
    if on_unsupported == "error":
        raise ValueError(
            f"{message} Leave it out of target_modules, or set on_unsupported='warn' to train it without noise."
        )
    warnings.warn(f"{message} It is trained without noise (on_unsupported='warn').", stacklevel=2)
    return False


def release(layer: Any) -> None:
    """Undo `adopt`: the layer is again what peft made, and nothing of ours stays on it."""
    plain = layer.plain_class
    for name in ("perturbation", "stream", "number", "flat_adapters", "offsets", "_norms"):
        layer.__dict__.pop(name)
    layer.__class__ = plain


def unsupported(layer: Any, adapter: str) -> str | None:
    """Why this adapter of a LoRA layer cannot be perturbed, or None if it can."""
    plain = getattr(type(layer), "plain_class", type(layer))
    if plain not in (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d):
        return f"peft adapts it with {plain.__name__}, which is not supported"
    base = layer.base_layer
    if isinstance(base, BaseTunerLayer):
        return f"it is wrapped around another adapter layer ({type(base).__name__})"
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "torch's MultiheadAttention reads its weight without calling it"
    if type(base).forward not in STOCK_FORWARDS and not hasattr(base, "embed_scale"):
        return f"{type(base).__name__} has a forward of its own"
    if not base.weight.is_floating_point():
        return f"its weight is stored as {base.weight.dtype}"
    if getattr(base, "_hf_tp_plan", None) is not None or is_dtensor(base.weight):
        return f"{SPLIT}; FSDP2's fully_shard comes after the adapter"
    variant = type(layer.lora_variant.get(adapter))
    if adapter in layer.lora_variant and not issubclass(variant, VARIANTS):
        return f"{variant.__name__} of adapter {adapter!r} is not supported"
    return None


def flat_layers(model: nn.Module) -> Iterator[Any]:
    """The flat layers of a model."""
    return (module for module in model.modules() if isinstance(module, FlatLayer))


def _calling_tuner() -> BaseTuner:
    """The tuner that is injecting layers just now.

    peft hands a custom-module factory the target and no more, but the layers of a model share their state, and where
    a pass begins is seen on the model. So the caller is asked: the one frame up the stack whose `self` is a tuner.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        tuner = frame.f_locals.get("self")
        if isinstance(tuner, BaseTuner):
            return tuner
        frame = frame.f_back
    raise RuntimeError("FlatLoraConfig makes layers only for a peft tuner (get_peft_model, inject_adapter_in_model)")


@contextmanager
def _as_plain(config: Any) -> Iterator[None]:
    """A FlatLoraConfig as the LoraConfig that it extends, for as long as peft builds a layer from it."""
    flat, custom = type(config), config._custom_modules
    if flat is LoraConfig:
        yield
        return
    config.__class__ = LoraConfig
    config._custom_modules = {key: value for key, value in (custom or {}).items() if value is not create_layer}
    try:
        yield
    finally:
        config.__class__, config._custom_modules = flat, custom


def _moved_forward(module: Any, offset: Tensor, x: Tensor) -> Tensor:
    weight = module.weight + offset.to(module.weight)
    if isinstance(module, CONVOLUTIONS):
        return module._conv_forward(x, weight, module.bias)
    return F.linear(x, weight, module.bias)


def _rows(base: Any) -> Tensor:
    """The weight as a matrix with one output per row: Conv1D stores (in, out); a filter is flattened."""
    return base.weight.T if isinstance(base, Conv1D) else base.weight.flatten(1)


@cache
def flat_class(plain: type) -> type:
    """The class of a flat layer over the class that peft gave it."""
    return type(f"Flat{plain.__name__}", (FlatLayer, plain), {"plain_class": plain, "__module__": __name__})


def _rebuild(plain: type) -> nn.Module:
    return object.__new__(flat_class(plain))


_Layer: Any = object  # for the type checker: in use, the class that peft has made comes next


class FlatLayer(_Layer):
    """Mix-in in front of a LoRA layer's class; see the head of this module."""

    plain_class: type
    perturbation: Perturbation
    stream: int  # index of the layer in the noise contract
    number: int  # names the layer in compiled code
    flat_adapters: set[str]  # the adapters whose training is perturbed here
    offsets: dict[tuple[str, str], Tensor]  # what the method keeps here, by factor ("lora_B") and adapter
    _norms: dict[str, tuple]  # cached norms, each with what it was computed from

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = super().forward
        if self._rho(kwargs) == 0:
            return plain(x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            return self._perturbed(plain, x, *args, **kwargs)
        return self._compiled(x) if self._is_plain_linear() else self._graph_break(plain, x, *args, **kwargs)

    @torch.compiler.disable
    def _graph_break(self, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._perturbed(plain, x, *args, **kwargs)

    def _perturbed(self, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.perturbation.settings.method.forward(self, plain, x, *args, **kwargs)
        if out.requires_grad:
            out.register_hook(self.perturbation.backward_began)
        return out

    def with_noise(self, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """peft's forward with Gaussian noise in the merged weight, see `noise`."""
        base = self.get_base_layer()
        if isinstance(base, nn.Embedding):
            out = self._add_row_noise(plain(x, *args, **kwargs), x)
        elif any(self.use_dora.get(name) for name in self._active()):
            none = base.weight.new_zeros(1).expand_as(base.weight)  # W = 0 without its memory: eps alone
            out = plain(x, *args, **kwargs) + self._product(x, none, None, *self.noise())
        else:
            in_place = any(name in self.lora_variant for name in self._active())  # some add to the base product itself

            def product(x: Tensor) -> Tensor:  # the base layer's hooks have brought its weight by now
                out = self._product(x, base.weight, base.bias, *self.noise())
                return out.clone() if in_place else out

            with replaced_forward(base, product):
                out = plain(x, *args, **kwargs)
        return out

    @contextmanager
    def moved(self, offsets: dict[tuple[str, str], Tensor]) -> Iterator[None]:
        """lora_A and lora_B compute with weight + offset for the time being; the weights are not written."""
        with ExitStack() as stack:
            for (factor, adapter), offset in offsets.items():
                module = getattr(self, factor)[adapter]
                module = getattr(module, "_fsdp_wrapped_module", module)
                stack.enter_context(replaced_forward(module, partial(_moved_forward, module, offset)))
            yield

    def _is_plain_linear(self) -> bool:
        base = self.get_base_layer()
        hooked = base._forward_pre_hooks or base._forward_hooks or "forward" in base.__dict__
        if hooked or not isinstance(self.perturbation.settings.method, FlatLora):
            return False
        return isinstance(base, nn.Linear) and not any(name in self.lora_variant for name in self._active())

    def _compiled(self, x: Tensor) -> Tensor:
        """peft's forward of a plain linear layer, with operators that `torch.compile` can keep in one graph."""
        base = self.get_base_layer()
        row_std, key = torch.ops.flatlora.layer_noise(base.weight.detach(), self.number)
        out = self._product(x, base.weight, base.bias, row_std, key)
        dtype = out.dtype
        for name in self._active():
            x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
            out = out + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return out.to(dtype)

    def noise(self) -> tuple[Tensor, Tensor]:
        """Standard deviation of each row of eps, (m,), and the key of the noise, for the forward that asks."""
        weight = self.get_base_layer().weight
        if is_dtensor(weight):
            raise RuntimeError(f"{SPLIT}. Use DDP, FSDP or ZeRO.")
        key, sample = self.perturbation.draw(weight.device)
        n = weight.numel() // self.out_features
        method: Any = self.perturbation.settings.method
        rho_t = self._strength() * self.perturbation.ramp
        return method.noise_norms(self._row_norms(sample)) * (rho_t / math.sqrt(n)), key

    # ---- when ----

    def _rho(self, kwargs: dict[str, Any]) -> float:
        """rho of the flat adapters that are active here (the largest); 0 where this forward is to be clean."""
        state = self.perturbation
        if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
            return 0.0
        rho = self._strength()
        # an adapter that is injected after model.eval() is in training mode, its base layer is not
        return rho if rho > 0 and state.wants_noise(self.training and self.get_base_layer().training) else 0.0

    def _strength(self) -> float:
        rhos = self.perturbation.rhos
        return max([0.0, *[rhos[name] for name in self.active_flat_adapters()]])

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]

    def active_flat_adapters(self) -> list[str]:
        """Names of the adapters that are active here and flat."""
        return [name for name in self._active() if name in self.flat_adapters]

    # ---- how strong ----

    def _row_norms(self, sample: int) -> Tensor:
        """``||W'_i||`` of the merged weight, (m,); with DoRA the absolute value of the magnitude vector."""
        state, active = self.perturbation, self._active()
        # where no optimizer step has been seen, parameters may change unseen (through .data, in a flattened copy)
        when = (state.steps,) if state.sees_steps else (state.steps, sample)
        versions = tuple((p.data_ptr(), p._version) for p in self._factors(active))
        scales = tuple(self.scaling[name] for name in active)
        return self._cached("merged", (*when, *active, *scales, *versions), self._merged_row_norms)

    def _cached(self, name: str, source: tuple, compute: Callable[[], Tensor]) -> Tensor:
        found = self._norms.get(name)
        if found is None or found[0] != source:
            found = self._norms[name] = (source, compute())
        return found[1]

    def _factors(self, active: list[str]) -> list[Tensor]:
        weight = self.get_base_layer().weight
        factors = (self.lora_A, self.lora_B, self.lora_magnitude_vector)
        found = [factor[name].weight for name in active for factor in factors if name in factor]
        return [weight, *found, *(diag for name, diag in getattr(self, "lora_diag", {}).items() if name in active)]

    @torch.no_grad()
    def _merged_row_norms(self) -> Tensor:
        active, base = self._active(), self.get_base_layer()
        dtype = norm_dtype(base.weight.dtype)
        dora = [name for name in active if self.use_dora.get(name)]
        if dora:  # the magnitude of the last one applied is the norm of the merged row
            return whole_weight(self.lora_magnitude_vector[dora[-1]]).detach().flatten().abs().to(dtype)
        weight = _rows(base)
        source = (base.weight.data_ptr(), base.weight._version, base.weight.dtype, base.weight.device)
        squared = self._cached("base", source, lambda: squared_row_norms(weight))
        A, B = map(list, zip(*(self._dense_factors(name) for name in active), strict=True))
        scales = [self.scaling[name] for name in active]
        if getattr(base, "groups", 1) == 1 and len(active) == 1:
            return merged_row_norms(weight, squared, B[0], A[0], scales[0])
        B = [b.to(dtype) * scale for b, scale in zip(B, scales, strict=True)]
        if getattr(base, "groups", 1) > 1:
            return grouped_row_norms(weight, squared, B, A, base.groups)
        return merged_row_norms(weight, squared, torch.cat(B, dim=1), torch.cat(A))

    def _dense_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A, (r, n), and B, (m, r), whose product this adapter adds, without its scale."""
        A, B = (
            (f.weight_as_blockdiagonal_matrix() if isinstance(f, BlockDiagonalLinear) else whole_weight(f)).detach().flatten(1)
            for f in (self.lora_A[name], self.lora_B[name])
        )
        singular = getattr(self, "lora_diag", {})  # KaSA's learned singular values
        return (A * singular[name].detach()[:, None] if name in singular else A), B

    # ---- the product ----

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, row_std: Tensor, key: Tensor) -> Tensor:
        base, backend = self.get_base_layer(), self.perturbation.settings.backend
        if not isinstance(base, CONVOLUTIONS):
            weight = weight.T if isinstance(base, Conv1D) else weight
            owner = self.perturbation.number
            return perturbed_linear(x, weight, bias, row_std, key, self.stream, backend=backend, owner=owner)
        padding: Any = base.padding
        if isinstance(padding, str) or base.padding_mode != "zeros":
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(base.stride)
        geometry: Any = {"stride": base.stride, "padding": padding, "dilation": base.dilation, "groups": base.groups}
        return perturbed_conv(x, weight, bias, row_std, key, self.stream, backend=backend, **geometry)

    def _add_row_noise(self, out: Tensor, tokens: Tensor) -> Tensor:
        # the output of an embedding is the merged row itself, so its norm is the row norm, DoRA and scales included
        n, backend = out.shape[-1], self.perturbation.settings.backend
        key, _ = self.perturbation.draw(out.device)
        rho_t = self._strength() * self.perturbation.ramp
        merged = out.detach().flatten(0, -2)
        row_std = torch.linalg.vector_norm(merged, dim=-1, dtype=norm_dtype(out.dtype)) * (rho_t / math.sqrt(n))
        noise = row_noise(tokens.flatten(), row_std, key, self.stream, n, dtype=out.dtype, backend=backend)
        return out + noise.view_as(out)

    # ---- what peft does with a layer ----

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
        if hasattr(config, "rho"):
            state = Perturbation.shared(self.perturbation.model, config.settings())
            adopt(self, adapter_name, state, config.rho, config.on_unsupported, kwargs.get("target_name", "?"))

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.flat_adapters.discard(adapter_name)
        self.offsets = {key: offset for key, offset in self.offsets.items() if key[1] != adapter_name}
        self.perturbation.rhos.pop(adapter_name, None)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """peft's door for layers that unload in their own way; ours lets the model's hooks go with the last layer."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.get_base_layer()
        state = self.perturbation
        if all(layer is self for layer in flat_layers(state.model)):
            state.close()
        return base

    def _enrol(self) -> None:
        self.__dict__["number"] = next(_numbers)
        LAYERS[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enrol()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (self.plain_class,), self.__dict__  # the class is made at run time, so by its recipe


LAYERS: weakref.WeakValueDictionary[int, FlatLayer] = weakref.WeakValueDictionary()  # by number
_numbers = itertools.count()


@torch.library.custom_op("flatlora::layer_noise", mutates_args=())
def _layer_noise(weight: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """`FlatLayer.noise` at the run time of compiled code: what changes from step to step stays out of its graph."""
    row_std, key = LAYERS[number].noise()
    return row_std.clone(), key.clone()


@_layer_noise.register_fake
def _(weight: Tensor, number: int) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape[0], dtype=norm_dtype(weight.dtype)), LAYERS[number].perturbation.empty_key(
        weight.device
    )
