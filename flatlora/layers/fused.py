"""Compute a linear layer with its adapters in one autograd node, with or without noise in W."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..methods.base import FactorOffset, WeightNoise
from ..ops import Branch, RowNoise, adapted_linear, dora_linear, makes_norms, resolve_backend
from ..ops.checks import Matrix
from ..ops.fused_lora import masked_branch
from . import factor_offsets
from .quantized_rows import FourBitRows
from .row_norms import compute_row_norms, merged_source, norms_before_dora

if TYPE_CHECKING:
    from .flat_layer import FlatLayer

GLOBAL_HOOKS: list[Any] = [  # of `torch.nn.modules.module.register_module_forward_hook` and its like
    getattr(nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward_pre", "forward", "backward_pre", "backward")
]


class Adapter(NamedTuple):
    """An adapter of two matrices."""

    name: str
    A: nn.Linear
    B: nn.Linear


class Operands(NamedTuple):
    """A linear layer and its active adapters."""

    base: Any  # nn.Linear, Conv1D, or Linear4bit of bitsandbytes
    adapters: list[Adapter]
    magnitude: Tensor | None  # with DoRA

    @property
    def is_dense(self) -> bool:
        """Whether W is not quantized."""
        return type(self.base) in (nn.Linear, Conv1D)

    def rows(self, backend: str = "auto") -> Matrix:
        """W with one output per row, (m, n): Conv1D stores (n, m). A Triton kernel reads the 4 bits themselves."""
        if not self.is_dense:
            rows = FourBitRows(self.base)
            decoded = self.magnitude is None and resolve_backend(backend, rows.device) == "triton"
            return rows.in_four_bits() if decoded else rows
        weight: Tensor = self.base.weight
        return weight.T if isinstance(self.base, Conv1D) else weight

    def tensors(self) -> list[Tensor]:
        """The tensors from which the merged weight is computed."""
        stored = [self.base.weight] if self.is_dense else [*self.base.parameters(), *self.base.buffers()]
        return [*stored, *(factor.weight for _, A, B in self.adapters for factor in (A, B))]


def operands(layer: FlatLayer) -> Operands | None:
    """The operands of this path, or None for a layer that it does not take.

    It takes a linear layer, dense or with 4 bits of bitsandbytes, with adapters of two matrices, or one with DoRA,
    without hooks on these modules or on all.
    """
    if any(GLOBAL_HOOKS):
        return None
    names = layer.active_lora_adapters()
    modules: Any = layer._modules  # spares the lookups of nn.Module.__getattr__
    base = modules["base_layer"]
    if not names or not (_is_dense(layer, base) or _is_four_bit(layer, base)) or _has_hooks(base):
        return None
    adapters: list[Adapter] = []
    for name in names:
        A, B = (modules[factor]._modules.get(name) for factor in ("lora_A", "lora_B"))
        if not (type(A) is type(B) is nn.Linear and A.bias is B.bias is None) or _has_hooks(A) or _has_hooks(B):
            return None
        adapters.append(Adapter(name, A, B))
    magnitude = _magnitude(layer, names) if layer.lora_variant else None
    return None if layer.lora_variant and magnitude is None else Operands(base, adapters, magnitude)


def _is_dense(layer: FlatLayer, base: Any) -> bool:
    is_linear = layer.peft_class is lora.Linear and type(base) in (nn.Linear, Conv1D)
    return is_linear and type(base.weight) in (nn.Parameter, Tensor)


def _is_four_bit(layer: FlatLayer, base: Any) -> bool:
    """Whether W has 4 bits, and the method adds noise: else the base product is that of bitsandbytes."""
    if layer.peft_class.__name__ != "Linear4bit" or not isinstance(layer.perturbation.settings.method, WeightNoise):
        return False
    return not layer.base_has_changed()


def _magnitude(layer: FlatLayer, names: list[str]) -> Tensor | None:
    """The magnitudes of the only active adapter, if it has DoRA and the noise is relative to them."""
    method = layer.perturbation.settings.method
    if len(names) != 1 or not isinstance(method, WeightNoise) or not method.is_relative_to_row_norms:
        return None
    base: Any = layer.get_base_layer()
    if type(layer.lora_variant.get(names[0])) is not DoraLinearVariant or base.weight.requires_grad:
        return None  # the node has no gradient of W
    module = layer.lora_magnitude_vector[names[0]]
    weight = module.weight
    is_here = type(weight) is nn.Parameter and weight.ndim == 1 and weight.device == layer.weights.device
    return weight if is_here and not _has_hooks(module) else None


def forward(layer: FlatLayer, operands: Operands, x: Tensor) -> Any:
    """The perturbed forward of the layer."""
    if isinstance(layer.perturbation.settings.method, FactorOffset):
        return factor_offsets.forward(layer, lambda x: _adapted_linear(layer, operands, operands.rows(), x), x)
    return _with_noise(layer, operands, x)


def _with_noise(layer: FlatLayer, operands: Operands, x: Tensor) -> Tensor:
    """If the row norms are not known and the kernel can compute them, it does so in the pass that adds the noise."""
    perturbation = layer.perturbation
    weight = operands.rows(perturbation.settings.backend)
    method = perturbation.settings.method
    assert isinstance(method, WeightNoise)
    key, _ = perturbation.draw(x.device)
    source = merged_source(layer, [adapter.name for adapter in operands.adapters], operands.tensors())
    relative = layer.relative_std(weight.shape[1], x.device)
    if operands.magnitude is not None:
        before = layer._norms.get_or_compute("before DoRA", source, lambda: norms_before_dora(layer))
        return _dora_linear(layer, operands, weight, x, RowNoise(before, relative, key, layer.stream))
    norms = layer._norms.find("merged", source)
    in_kernel = norms is None and method.is_relative_to_row_norms and makes_norms(weight, perturbation.settings.backend)
    if in_kernel:
        norms = scale = torch.empty(len(weight), dtype=torch.float32, device=x.device)
    else:
        norms = layer._norms.get_or_compute("merged", source, lambda: compute_row_norms(layer))
        scale = method.row_scale(norms)
    out = _adapted_linear(layer, operands, weight, x, RowNoise(scale, relative, key, layer.stream, in_kernel))
    if in_kernel:
        layer._norms.keep("merged", source, norms)
    return out


def _adapted_linear(
    layer: FlatLayer, operands: Operands, weight: Matrix, x: Tensor, noise: RowNoise | None = None
) -> Tensor:
    bias, dtype = _bias_and_dtype(operands, x)
    backend, branches = layer.perturbation.settings.backend, _branches(layer, operands, x)
    return adapted_linear(x, weight, bias, branches, noise, dtype=dtype, backend=backend, owner=layer.number)


def _dora_linear(layer: FlatLayer, operands: Operands, weight: Matrix, x: Tensor, noise: RowNoise) -> Tensor:
    assert operands.magnitude is not None
    bias, dtype = _bias_and_dtype(operands, x)
    backend, (branch,) = layer.perturbation.settings.backend, _branches(layer, operands, x)
    magnitude = operands.magnitude
    return dora_linear(x, weight, bias, branch, magnitude, noise, dtype=dtype, backend=backend, owner=layer.number)


def _branches(layer: FlatLayer, operands: Operands, x: Tensor) -> list[Branch]:
    branches = []
    for name, A, B in operands.adapters:
        dropout: Any = layer.lora_dropout[name]
        branch = Branch(A.weight, B.weight, float(layer.scaling[name]))
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            plain = operands.magnitude is None and type(dropout) is nn.Dropout and not _has_hooks(dropout)
            in_kernel = masked_branch(branch, x, dropout.p) if plain else None
            branch = in_kernel or branch._replace(dropped=dropout(layer._cast_input_dtype(x, A.weight.dtype)))
        branches.append(branch)
    return branches


def _bias_and_dtype(operands: Operands, x: Tensor) -> tuple[Tensor | None, torch.dtype | None]:
    """The bias, and the dtype in which bitsandbytes computes its product."""
    base = operands.base
    if operands.is_dense:
        return base.bias, None
    dtype: torch.dtype = base.compute_dtype if base.compute_type_is_set and base.compute_dtype else x.dtype
    return None if base.bias is None else base.bias.to(dtype), dtype


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in module.__dict__
