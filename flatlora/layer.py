"""One adapted layer: its weight, its row norms, and the forward at W + sBA + eps.

A layer that peft made keeps its class and gets `FlatLayer` in front of it, so `isinstance` and everything peft does
with it go on as before. A forward that is not to be perturbed is peft's own forward, untouched.

| what is adapted                          | how eps enters                                                      |
|------------------------------------------|---------------------------------------------------------------------|
| Linear, Conv1D, Conv1d/2d/3d             | the base product is computed once, with W + eps in place of W       |
| the same with DoRA                       | x eps^T is added: DoRA rescales the base product, and its magnitude |
|                                          | would otherwise receive the gradient of the noise                   |
| Embedding                                | the rows of eps that were looked up are added                       |
| quantised layers, attention, experts     | see `quantised.py` and `merged.py`                                  |
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import BlockDiagonalLinear, QALoraLinearVariant
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook
from transformers.pytorch_utils import Conv1D

from .compiled import note_compiling
from .method import FlatLora
from .ops import (
    RowNoise,
    lora_linear,
    makes_norms,
    merged_row_norms,
    perturbed_conv,
    perturbed_linear,
    row_noise,
    squared_row_norms,
    sums_merged_rows,
)
from .ops.blocks import unwatched
from .ops.custom_ops import compiled_perturbed_linear
from .ops.norms import grouped_row_norms, norm_dtype, vector_norms
from .ops.registry import backward_began, register
from .passes import tensors
from .spread import is_dtensor, is_gathered, moved_weight, refuse_fsdp1, replaced_forward, whole_weight
from .state import Perturbation, Record
from .support import CONVOLUTIONS, SPLIT, check_changed_base, is_of_torch
from .transforms import is_transformed, transformed_forward
from .weights import quantised_row_norms, squared_norms


def flat_layers(model: nn.Module) -> Iterator[Any]:
    """The flat layers of a model."""
    return (module for module in model.modules() if isinstance(module, FlatLayer))


def _rows(base: Any) -> Tensor:
    """The weight as a matrix with one output per row: Conv1D stores (in, out); a filter is flattened."""
    return base.weight.T if isinstance(base, Conv1D) else base.weight.flatten(1)


def _is_watched(module: nn.Module) -> bool:
    """Would calling the module do more than its forward?"""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in module.__dict__


class _OneAdapter(NamedTuple):
    """A linear layer, and its one adapter."""

    name: str
    base: Any
    A: nn.Linear
    B: nn.Linear

    def rows(self) -> Tensor:
        """The weight with one output per row: Conv1D stores (in, out)."""
        weight: Tensor = self.base.weight
        return weight.T if isinstance(self.base, Conv1D) else weight


_ALWAYS = object()  # for what does not depend on the pass
_Layer: Any = object  # for the type checker: in use, the class that peft has made comes next


OWN_ATTRIBUTES = (  # of a flat layer, beside those of the class that peft made
    *("perturbation", "stream", "number", "address", "flat_adapters", "offsets", "strict", "user_thread"),
    *("lock", "_norms", "_base_forward"),
)


class FlatLayer(_Layer):
    """Mix-in in front of a LoRA layer's class; see the head of this module."""

    plain_class: type
    perturbation: Perturbation
    stream: int  # index of the layer in the noise contract
    number: int  # of the layer in `ops.registry`
    address: Tensor  # number and stream, for compiled code, see `ops.custom_ops`
    flat_adapters: set[str]  # the adapters whose training is perturbed here
    offsets: dict[tuple[str, str], Tensor]  # what the method keeps here, by factor ("lora_B") and adapter
    strict: bool  # kernels that pass this layer by are an error
    lock: Any  # an RLock: some forwards change the modules inside for their time, and other threads must not see it
    user_thread: int  # where the user's code runs, in a replica of `nn.DataParallel`
    _norms: dict[str, tuple]  # cached norms, each with what it was computed from
    _base_forward: Any  # of the base layer, as it was when the layer became flat

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = super().forward
        if torch.compiler.is_compiling():
            return self._forward_in_compiler(plain, x, *args, **kwargs)
        self.perturbation.passes.note_layer(self.number)
        with self.lock:
            return self._eager(plain, x, *args, **kwargs)

    def _eager(self, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._strength() == 0 or self.disable_adapters or self.merged:
            return self._clean(plain, x, *args, **kwargs)
        record = self._record()
        if not record.perturbed:
            return self._clean(plain, x, *args, **kwargs)
        self._refuse_mixed_batch(kwargs)
        with self.perturbation.forward_of(record):
            return self._perturbed(plain, x, *args, **kwargs)

    def _forward_in_compiler(self, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = self.perturbation
        note_compiling(state.number)
        if self._strength() == 0 or self.disable_adapters or self.merged:
            return plain(x, *args, **kwargs)
        perturbed = state.compiled_forward_is_perturbed(self.training and self.get_base_layer().training)
        if perturbed is None:
            return self._graph_break(x, *args, **kwargs)
        if not perturbed:
            return plain(x, *args, **kwargs)
        self._refuse_mixed_batch(kwargs)
        return self._compiled(x) if self._is_plain_linear() else self._graph_break(x, *args, **kwargs)

    @torch.compiler.disable
    def _graph_break(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward(x, *args, **kwargs)

    def _record(self) -> Record:
        # an adapter that is injected after model.eval() is in training mode, its base layer is not
        training = self.training and self.get_base_layer().training
        return self.perturbation.record_of_forward(self.number, training, self.__dict__.get("user_thread"))

    def _refuse_mixed_batch(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names gives each row of the batch a merged weight of its own, and the noise is relative to "
                "one: call the model once per adapter, or under flatlora.unperturbed(model)"
            )

    def _clean(self, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled():
            self._note_run()
            if not (self.training and self.get_base_layer().training):
                self.perturbation.layers_in_eval.add(self.number)
        return plain(x, *args, **kwargs)

    def _perturbed(self, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.perturbation.layers_perturbed.add(self.number)
        method = self.perturbation.settings.method
        if is_transformed():
            return transformed_forward(self, plain, x, *args, **kwargs)
        one = None if args or kwargs else self._one_adapter()
        if one is not None:
            if isinstance(method, FlatLora):
                return self._in_one_node_with_noise(one, x)
            return method.forward(self, partial(self._in_one_node, one), x)
        dora = [self.lora_A[name] for name in self._active() if self.use_dora.get(name) and name in self.lora_A]
        refuse_fsdp1("DoRA", [A for A in dora if A.weight.ndim < 2], "Set use_orig_params=False, or use FSDP2.")
        out, number = method.forward(self, plain, x, *args, **kwargs), self.number

        @unserializable_hook  # an output may be saved, and its hooks need not be
        def hook(_grad: Tensor) -> None:
            backward_began(number)

        for tensor in tensors(out):
            if tensor.requires_grad:
                tensor.register_hook(hook)
        return out

    def on_backward(self) -> None:
        """A backward pass has reached the layer; see `ops.registry`."""
        self._note_run()
        self.perturbation.backward_began()

    def _note_run(self) -> None:
        """This layer takes part in the coming optimizer step, see `checks.check_layers_run`."""
        self.perturbation.layers_run.add(self.number)

    def with_noise(self, plain: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """peft's forward with Gaussian noise in the merged weight, see `noise`."""
        base = self.get_base_layer()
        if isinstance(base, nn.Embedding):
            return self._add_row_noise(plain(x, *args, **kwargs), x)
        if self._base_has_changed(base):
            return self._add_noise_product(plain(x, *args, **kwargs), x, x)
        if any(self.use_dora.get(name) for name in self._active()):
            return self._add_noise_product(plain(x, *args, **kwargs), x, base.weight)
        # the base layer's hooks bring its weight
        with replaced_forward(base, lambda x: self._product(x, base.weight, base.bias, *self.noise())):
            return plain(x, *args, **kwargs)

    def _add_noise_product(self, out: Tensor, x: Tensor, like: Tensor) -> Tensor:
        """``out + x eps^T``: the base layer's product stays its own. eps is rounded to the dtype of `like`."""
        base: Any = self.get_base_layer()
        if isinstance(base, CONVOLUTIONS):
            shape = tuple(base.weight.shape)
        else:
            shape = (self.in_features, self.out_features)[:: 1 if isinstance(base, Conv1D) else -1]
        none = torch.zeros(1, dtype=like.dtype, device=like.device).expand(shape)  # W = 0 without its memory: eps alone
        return out + self._product(x, none, None, *self.noise())

    # ---- what the base layer is ----

    def remember_base(self) -> None:
        """Note how the base layer makes its product, which is ours to make while it stays that way."""
        self.__dict__["_base_forward"] = type(self.get_base_layer()).forward

    def _base_has_changed(self, base: Any) -> bool:
        """Has something else taken the place of the base layer's product (QAT, float8, quantization, a patch)?

        Raises:
            RuntimeError: it has, and the new weight cannot be perturbed.
        """
        replaced = "forward" in base.__dict__ and "_old_forward" not in base.__dict__  # accelerate's brings the weight
        if not replaced and type(base).forward is self._base_forward and self._is_base_weight_ours(base):
            return False
        check_changed_base(self, base)
        return True

    def _is_base_weight_ours(self, base: Any) -> bool:
        weight = base._parameters.get("weight")
        return weight is None or is_of_torch(weight)  # None: a parametrization or FSDP brings it

    @contextmanager
    def moved(self, offsets: dict[tuple[str, str], Tensor]) -> Iterator[None]:
        """lora_A and lora_B have weight + offset for a weight, for the time being; the parameters are not written."""
        with ExitStack() as stack:
            for (factor, adapter), offset in offsets.items():
                stack.enter_context(moved_weight(getattr(self, factor)[adapter], offset))
            yield

    def parts(self) -> list[Any]:
        """The flat layers whose forward this layer's forward is: itself, and what is adapted inside of it."""
        return [self]

    def _is_plain_linear(self) -> bool:
        base = self.get_base_layer()
        hooked = base._forward_pre_hooks or base._forward_hooks or "forward" in base.__dict__
        if hooked or not isinstance(self.perturbation.settings.method, FlatLora):
            return False
        plain = self.plain_class is lora.Linear and type(base).forward is self._base_forward is nn.Linear.forward
        return plain and not any(name in self.lora_variant for name in self._active())

    def _one_adapter(self) -> _OneAdapter | None:
        """What `lora_linear` takes: a linear layer with one adapter of two plain matrices, and nobody who watches their
        modules. None for any other."""
        names, modules = self._active(), self._modules
        if len(names) != 1 or self.lora_variant or self.plain_class is not lora.Linear:
            return None
        base, A, B = modules["base_layer"], *(modules[f]._modules.get(names[0]) for f in ("lora_A", "lora_B"))
        if type(base) not in (nn.Linear, Conv1D) or type(base.weight) not in (nn.Parameter, Tensor):
            return None
        if not (type(A) is type(B) is nn.Linear and A.bias is B.bias is None):
            return None
        watched = _is_watched(base) or _is_watched(A) or _is_watched(B)
        return None if watched else _OneAdapter(names[0], base, A, B)

    def _in_one_node(self, one: _OneAdapter, x: Tensor, noise: RowNoise | None = None) -> Tensor:
        """peft's forward, with noise in the merged weight if it is given, in one autograd node."""
        name, base, A = one.name, one.base, one.A.weight
        dropout = self.lora_dropout[name]
        drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        return lora_linear(
            x, one.rows(), base.bias, A, one.B.weight, float(self.scaling[name]), noise,
            dropped=dropout(self._cast_input_dtype(x, A.dtype)) if drops else None,
            backend=self.perturbation.settings.backend, owner=self.number,
        )  # fmt: skip

    def _in_one_node_with_noise(self, one: _OneAdapter, x: Tensor) -> Tensor:
        """The row norms are made in the pass that makes the noise, where they are not known and the kernel can."""
        state, weight = self.perturbation, one.rows()
        key, _ = state.draw(x.device)
        method: Any = state.settings.method
        source = self._norms_source([one.name], [one.base.weight, one.A.weight, one.B.weight])
        known = self._is_cached("merged", source)
        compute_norms = not known and makes_norms(weight, state.settings.backend) and type(method) is FlatLora
        if compute_norms:
            norms = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        else:
            norms = method.noise_norms(self._cached("merged", source, self._merged_row_norms))
        relative = self._relative(weight.shape[1])
        out = self._in_one_node(one, x, RowNoise(norms, relative, key, self.stream, compute_norms))
        if compute_norms:
            self._keep("merged", source, norms)
        return out

    def _compiled(self, x: Tensor) -> Tensor:
        """peft's forward of a plain linear layer, with operators that `torch.compile` can keep in one graph."""
        base, backend = self.get_base_layer(), self.perturbation.settings.backend
        row_std, key = torch.ops.flatlora.layer_noise(base.weight.detach(), self.address)
        weight = base.weight
        out = compiled_perturbed_linear(x, weight, base.bias, row_std, key, self.address, backend=backend)
        dtype = out.dtype
        for name in self._active():
            x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
            out = out + self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
        return out.to(dtype)

    def compiled_noise(self) -> tuple[Tensor, Tensor]:
        """`noise` at the run time of compiled code, which has been compiled as perturbed."""
        with self.lock, self.perturbation.forward_of(self._record()):
            return self.noise()

    def noise(self) -> tuple[Tensor, Tensor]:
        """Standard deviation of each row of eps, (m,), and the key of the noise, for the forward that asks."""
        if is_dtensor(getattr(self.get_base_layer(), "weight", None)):
            raise RuntimeError(f"the layer cannot be perturbed: {SPLIT}. Use DDP, FSDP or ZeRO.")
        key, _ = self.perturbation.draw(self._device())
        return self._row_std(self._row_norms(), self._columns()), key

    def _row_std(self, row_norms: Tensor, n: int) -> Tensor:
        method: Any = self.perturbation.settings.method
        return method.noise_norms(row_norms) * self._relative(n)

    def _relative(self, n: int) -> float:
        """rho_t / sqrt(n): the standard deviation of the noise in a row relative to the row's norm."""
        return self._strength() * self.perturbation.ramp / math.sqrt(n)

    # ---- when ----

    def _strength(self) -> float:
        rhos = self.perturbation.rhos
        return max([0.0, *[rhos[name] for name in self.active_flat_adapters()]])

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]

    def active_flat_adapters(self) -> list[str]:
        """Names of the adapters that are active here and flat."""
        return [name for name in self._active() if name in self.flat_adapters]

    # ---- the weight ----

    def anchor(self) -> Any:
        """What stands for the frozen weight: layers that share it share their noise."""
        return self.get_base_layer().weight

    def _device(self) -> torch.device:
        return self.get_base_layer().weight.device

    def _columns(self) -> int:
        return self.get_base_layer().weight.numel() // self.out_features

    # ---- how strong ----

    def _row_norms(self) -> Tensor:
        """``||W'_i||`` of the merged weight, (m,); with DoRA the absolute value of the magnitude vector."""
        active = self._active()
        # which tensors there are differs between processes, which must agree on whether to gather
        gathered = any(is_gathered(A) for name, A in self.lora_A.items() if name in active)
        source = self._norms_source(active, [] if gathered else self._factors(active))
        return self._cached("merged", source, self._merged_row_norms)

    def _norms_source(self, active: list[str], factors: list[Tensor]) -> tuple:
        """What the row norms were computed from: norms are used again for the very same factors, in the same pass.

        A write through `.data` changes no version counter, so norms are not kept from one pass to the next.
        """
        scales = [float(self.scaling[name]) for name in active]  # a tensor when peft is to swap hot
        versions = [(p._version, p.data_ptr()) for p in factors]
        # autograd takes no tensor of inference mode
        return self.perturbation.token(), factors, (torch.is_inference_mode_enabled(), *active, *scales, *versions)

    def _is_cached(self, name: str, source: tuple) -> bool:
        if name not in self._norms or source[0] is None:
            return False
        token, factors, rest = self._norms[name][0]
        same = token is source[0] and rest == source[2] and len(factors) == len(source[1])
        return same and all(ref() is p for ref, p in zip(factors, source[1], strict=True))

    def _cached(self, name: str, source: tuple, compute: Callable[[], Tensor]) -> Tensor:
        if self._is_cached(name, source):
            return self._norms[name][1]
        with unwatched():
            value = compute()
        self._keep(name, source, value)
        return value

    def _keep(self, name: str, source: tuple, value: Tensor) -> None:
        """An address may be used again by another tensor; a weak reference is not."""
        token, factors, rest = source
        self._norms[name] = (token, [weakref.ref(p) for p in factors], rest), value

    def _factors(self, active: list[str]) -> list[Tensor]:
        weight = self.get_base_layer().weight
        factors = (self.lora_A, self.lora_B, self.lora_magnitude_vector)
        found = [factor[name] for name in active for factor in factors if name in factor]
        singular = getattr(self, "lora_diag", getattr(self, "lora_E", {}))  # KaSA's and AdaLoRA's
        values = [value for name, value in singular.items() if name in active]
        return [weight, *values, *(f if isinstance(f, Tensor) else f.weight for f in found)]

    @torch.no_grad()
    def _merged_row_norms(self) -> Tensor:
        active, base, magnitudes = self._active(), self.get_base_layer(), self._magnitudes()
        if not is_of_torch(base.weight):
            return self._row_norms_of_quantized(base)
        dtype = norm_dtype(base.weight.dtype)
        if magnitudes is not None:
            return magnitudes.to(dtype)
        weight, groups = _rows(base), getattr(base, "groups", 1)
        squared: Any = None if groups == 1 and sums_merged_rows(weight) else self._squared(weight)
        A, B = map(list, zip(*(self._dense_factors(name) for name in active), strict=True))
        scales = [float(self.scaling[name]) for name in active]
        if groups == 1 and len(active) == 1:
            return merged_row_norms(weight, squared, B[0], A[0], scales[0])
        B = [b.to(dtype) * scale for b, scale in zip(B, scales, strict=True)]
        if groups > 1:
            return grouped_row_norms(weight, squared, B, A, groups)
        return merged_row_norms(weight, squared, torch.cat(B, dim=1), torch.cat(A))

    def _row_norms_of_quantized(self, base: Any) -> Tensor:
        """Row norms over a weight that is stored in another form; the factors are concatenated, scales folded in."""
        stored = [*base.parameters(), *base.buffers()]
        takes = self._norms.get("takes", (torch.float32,))[0]
        squared = self._cached_of("base", stored, lambda: squared_norms(base, self.in_features, takes))
        A, B = zip(*(self._dense_factors(name) for name in self._active()), strict=True)
        scales = [float(self.scaling[name]) for name in self._active()]
        scaled = [b.float() * scale for b, scale in zip(B, scales, strict=True)]
        return quantised_row_norms(base, squared, torch.cat(scaled, dim=1), torch.cat([a.float() for a in A]), takes)

    def _magnitudes(self) -> Tensor | None:
        """With DoRA: the row norms, which are the magnitudes of the last adapter applied."""
        dora = [name for name in self._active() if self.use_dora.get(name)]
        return whole_weight(self.lora_magnitude_vector[dora[-1]]).detach().flatten().abs() if dora else None

    def _squared(self, weight: Tensor) -> Tensor:
        """``||W_i||^2`` of the base weight, which is computed once."""
        base = self.get_base_layer().weight
        return self._cached_of("base", [base], lambda: squared_row_norms(weight))

    def _cached_of(self, name: str, stored: list[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, kept for as long as these are the same tensors, unchanged."""
        kinds = [(p._version, p.data_ptr(), p.dtype, p.device) for p in stored]
        return self._cached(name, (_ALWAYS, stored, (torch.is_inference_mode_enabled(), kinds)), compute)

    def _dense_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A, (r, n), and B, (m, r), whose product this adapter adds, without its scale."""
        if isinstance(self, AdaLoraLayer):
            singular = self.lora_E[name] / (self.ranknum[name] + 1e-5)  # as peft divides
            return self.lora_A[name].detach() * singular.detach(), self.lora_B[name].detach()
        A, B = (
            (f.weight_as_blockdiagonal_matrix() if isinstance(f, BlockDiagonalLinear) else whole_weight(f))
            .detach()
            .flatten(1)
            for f in (self.lora_A[name], self.lora_B[name])
        )
        if isinstance(
            self.lora_variant.get(name), QALoraLinearVariant
        ):  # x is averaged over groups, times their number
            size = self.qalora_group_size[name]
            A = A.repeat_interleave(size, dim=1) * (A.shape[1] / size)
        singular = getattr(self, "lora_diag", {})  # KaSA's learned singular values
        return (A * singular[name].detach()[:, None] if name in singular else A), B

    # ---- the product ----

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, row_std: Tensor, key: Tensor) -> Tensor:
        base, backend = self.get_base_layer(), self.perturbation.settings.backend
        if not isinstance(base, CONVOLUTIONS):
            weight = weight.T if isinstance(base, Conv1D) else weight
            return perturbed_linear(x, weight, bias, row_std, key, self.stream, backend=backend)
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
        row_std = vector_norms(merged, norm_dtype(out.dtype)) * (rho_t / math.sqrt(n))
        noise = row_noise(tokens.flatten(), row_std, key, self.stream, n, dtype=out.dtype, backend=backend)
        return out + noise.view_as(out)

    def _enrol(self) -> None:
        self.perturbation.enrol(self)
        number = register(self)
        address = torch.tensor([number, self.stream], dtype=torch.int64, device="cpu")
        self.__dict__.update(number=number, address=address, lock=threading.RLock())
