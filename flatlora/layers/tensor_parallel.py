"""Linear layers whose weight is split over processes, as a DTensor: by its rows ("column-wise") or by its columns.

| split                 | W of a process | A           | B          | x            | output              |
|-----------------------|----------------|-------------|------------|--------------|---------------------|
| "column-wise": rows   | (m / p, n)     | whole       | rows       | whole        | part of the columns |
| "row-wise": columns   | (m, n / p)     | columns     | whole      | its columns  | summed              |

The noise of a part is that part of the noise of the whole weight, from the index of its first row and column. If the
columns are split, ``||W'_i||^2`` is the sum of the squared norms of the parts of row i. It is summed over the processes
for all such layers at once, at the first of them that runs after an optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from ..methods.base import FactorOffset, Method, WeightNoise
from ..ops import perturbed_linear
from ..ops.blocks import unwatched
from ..ops.norms import norm_dtype
from ..training.distributed import is_dtensor
from ..training.perturbation import Perturbation
from .module_weights import replaced_forward
from .row_norms import ANY_PASS, Source, norms_of_sum
from .supported import SPLIT

if TYPE_CHECKING:
    from .flat_layer import FlatLayer

PLANS = ("colwise", "rowwise", "embedding_rowwise")  # of transformers, for which peft splits A or B
FACTOR_PLANS = (
    "in the plan of parallelize_module, ColwiseParallel() for base_layer and lora_B.<adapter> of a column-wise layer, "
    "RowwiseParallel() for base_layer and lora_A.<adapter> of a row-wise layer"
)


class Part(NamedTuple):
    """The part of W that this process holds."""

    weight: Tensor  # (m_k, n_k)
    first_row: int
    first_column: int
    columns: int  # n, of the whole weight
    by_columns: bool
    mesh: Any  # the device mesh of one dimension over which W is split

    @property
    def offsets(self) -> dict[str, int]:
        """Where the part begins in W, as `perturbed_linear` takes it."""
        return {"first_row": self.first_row, "first_column": self.first_column}


def is_split(base: Any) -> bool:
    """Whether the weight of a base layer is split in its forward: a DTensor that FSDP2 does not gather there."""
    if not is_dtensor(base._parameters.get("weight")):
        return False
    from torch.distributed.fsdp import FSDPModule

    return not isinstance(base, FSDPModule)


@torch.no_grad()
def part_of(weight: Any) -> Part:
    """The part of a split weight, a DTensor, that this process holds.

    Raises:
        RuntimeError: the weight is not split along its rows or its columns into consecutive blocks.
    """
    from torch.distributed.tensor import Shard

    mesh, placements, shape = weight.device_mesh, weight.placements, weight.shape
    dim = placements[0].dim % 2 if len(placements) == 1 and type(placements[0]) is Shard and len(shape) == 2 else None
    if dim is None:
        raise RuntimeError(
            f"a weight of shape {tuple(shape)} is distributed as {placements} over {mesh}: only weights that are split "
            "into consecutive blocks of rows or columns over one dimension (ColwiseParallel, RowwiseParallel) can be "
            "perturbed. Leave the layer out of target_modules, or call flatlora.detach(model) to train without noise."
        )
    size = -(-shape[dim] // mesh.size())  # as torch.chunk divides
    first = min(mesh.get_local_rank() * size, shape[dim])
    first_row, first_column = (0, first) if dim else (first, 0)
    return Part(weight.to_local(), first_row, first_column, shape[1], dim == 1, mesh)


# ---- what can be perturbed ----


def unsupported(layer: Any, adapter: str, method: Method) -> str | None:
    """Why a new adapter of a layer that is split cannot be perturbed; None if it can, or if the layer is not split."""
    base = layer.get_base_layer()
    plan, split = getattr(base, "_hf_tp_plan", None), is_dtensor(base._parameters.get("weight"))
    if plan is None and not split:
        return None
    reason = _unsupported_kind(layer, adapter, method)
    if plan is None:
        reason = (
            "peft does not split the factors of an adapter that is made after torch's parallelize_module. Make it "
            f"before, and split the factors too: {FACTOR_PLANS}. FSDP2's fully_shard comes after the adapter as well"
        )
    elif reason is None and not split:
        reason = "transformers 5.17 or later is needed, which splits weights as DTensors"
    elif reason is None and plan not in PLANS:
        reason = f"peft splits no factor for the plan {plan!r}, but for {', '.join(map(repr, PLANS))}"
    return None if reason is None else f"{SPLIT}, and {reason}"


def check_config(target: Any, config: Any, name: str) -> None:
    """Check the configuration of a layer before peft makes it.

    Raises:
        ValueError: peft cannot make it for a split weight, for plain LoRA either.
    """
    if config.use_dora and getattr(target, "_hf_tp_plan", None) is not None:
        raise ValueError(
            f"use_dora must be False for the layer {name!r}: {SPLIT}, and peft computes the magnitudes of DoRA from a "
            "whole weight only. Use FSDP2, or plain LoRA."
        )


def check(layer: FlatLayer) -> None:
    """Check a layer whose weight was split after the adapter was made.

    Raises:
        RuntimeError: it cannot be perturbed.
    """
    method = layer.perturbation.settings.method
    for adapter in layer.active_lora_adapters():
        reason = _unsupported_kind(layer, adapter, method)
        if reason is not None:
            raise RuntimeError(f"a {type(layer).__name__} cannot be perturbed: {SPLIT}, and {reason}.")


def _unsupported_kind(layer: Any, adapter: str, method: Method) -> str | None:
    if isinstance(method, FactorOffset):
        return f"{type(method).__name__} needs whole factors and gradients: use FlatLoraConfig, DDP or one process"
    if not (isinstance(method, WeightNoise) and method.is_relative_to_row_norms):
        return f"{type(method).__name__} needs the norms of all rows: use FlatLoraConfig, DDP or FSDP2"
    peft_class, base = getattr(type(layer), "peft_class", type(layer)), layer.get_base_layer()
    if (peft_class, type(base)) not in ((lora.Linear, nn.Linear), (lora.Embedding, nn.Embedding)):
        return f"a {peft_class.__name__} over a {type(base).__name__} is supported whole only: use FSDP2"
    if adapter in layer.lora_variant:
        return f"{type(layer.lora_variant[adapter]).__name__} is supported whole only: use FSDP2, or plain LoRA"
    return None


def declare_widths(layer: Any, adapter: str) -> None:
    """Set the widths of the factors to those of the whole weight, which transformers 5.22 and later read.

    peft 0.21 gives the factors the widths of the part, so that a row-wise layer fails in its first forward.
    """
    base = layer.get_base_layer()
    plan = getattr(base, "_hf_tp_plan", None)
    if plan in ("colwise", "rowwise") and isinstance(base, nn.Linear) and adapter in layer.lora_A:
        if plan == "rowwise":
            layer.lora_A[adapter].in_features = base.in_features
        else:
            layer.lora_B[adapter].out_features = base.out_features


# ---- the forward ----


def forward(layer: FlatLayer, peft_forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """peft's forward with W + eps for the base layer's weight.

    Raises:
        RuntimeError: the factors are not split as W is, or the processes that W is split over do not share their noise.
    """
    base: Any = layer.get_base_layer()
    with replaced_forward(base, lambda x: _base_forward(layer, base, x)):
        return peft_forward(x, *args, **kwargs)


def _base_forward(layer: FlatLayer, base: Any, x: Any) -> Any:
    """The forward of the base layer: torch splits x and gathers the output by hooks, transformers in the forward."""
    plan = getattr(base, "_hf_tp_plan", None)
    if plan is None:
        return _product(layer, base, x)
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES  # type: ignore[attr-defined]  # re-exported

    style, mesh = ALL_PARALLEL_STYLES[plan], base._hf_device_mesh
    (x,), _ = style.transform_inputs_pre_forward(base, (x,), {}, mesh)
    return style.transform_output_post_forward(base, _product(layer, base, x), mesh)


def _product(layer: FlatLayer, base: Any, x: Any) -> Any:
    """``x (W + eps)^T + b`` of DTensors.

    Of a plain tensor it is the part of this process, without b if the parts are summed: transformers splits x and sums
    the parts itself where no gradient is recorded.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    part, run = part_of(base.weight), layer.perturbation
    _check_factors(layer, part)
    run.noise.check_shared(part.mesh)
    key, _ = run.draw(part.weight.device)
    row_std = layer.row_std(row_norms(layer, part), part.columns)
    distributed, bias = isinstance(x, DTensor), base.bias
    if distributed:
        wanted = Shard(x.ndim - 1) if part.by_columns else Replicate()
        x = x if x.placements == (wanted,) else x.redistribute(placements=[wanted])
        # each process computes the part of dL/dx that comes from its rows
        x = x.to_local() if part.by_columns else x.to_local(grad_placements=[Partial()])
    weight = base.weight.to_local() if base.weight.requires_grad else part.weight
    here = None if bias is None or part.by_columns else bias.to_local()
    backend = run.settings.backend
    out: Any = perturbed_linear(x, weight, here, row_std, key, layer.stream, backend=backend, **part.offsets)
    if not distributed:
        return out
    if part.by_columns:
        out = DTensor.from_local(out, part.mesh, [Partial()], run_check=False)
        return out if bias is None else out + bias
    shape = torch.Size((*out.shape[:-1], len(base.weight)))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(out, part.mesh, [Shard(out.ndim - 1)], run_check=False, shape=shape, stride=stride)


def _check_factors(layer: FlatLayer, part: Part) -> None:
    """Check that B is split with the rows of W, or A with its columns, and that the other factor is whole."""
    for name in layer.active_lora_adapters():
        factors = layer.lora_B[name].weight, layer.lora_A[name].weight
        split, whole = factors[::-1] if part.by_columns else factors
        is_whole = not is_dtensor(whole) or all(placement.is_replicate() for placement in whole.placements)
        if not is_dtensor(split) or part_of(split).by_columns != part.by_columns or not is_whole:
            raise RuntimeError(
                f"the weight of the base layer is split by its {'columns' if part.by_columns else 'rows'}, and the "
                f"factors of the adapter {name!r} are not split with it: {FACTOR_PLANS}."
            )


# ---- row norms ----


def row_norms(layer: FlatLayer, part: Part) -> Tensor:
    """``||W'_i||`` of the rows of a part, over all columns."""
    source = _source(layer, part)
    if part.by_columns:
        norms = layer._norms.find("merged", source)
        return _summed_norms(layer, part) if norms is None else norms
    return layer._norms.get_or_compute("merged", source, lambda: _norms_of_part(layer, part))


def _summed_norms(layer: FlatLayer, part: Part) -> Tensor:
    """The row norms of a layer whose columns are split, and of all other such layers, in one collective operation."""
    found = {}
    with unwatched():  # a recompute will find the norms
        parts = list(_split_by_columns(layer.perturbation, part.mesh))
        squares = [_norms_of_part(one, its).double().square() for one, its in parts]
        total = torch.cat(squares)
        torch.distributed.all_reduce(total, group=part.mesh.get_group())
        summed = torch.split(total.sqrt_(), [len(square) for square in squares])
    for (one, its), norms in zip(parts, summed, strict=True):
        found[one.number] = norms.to(norm_dtype(its.weight.dtype))
        one._norms.keep("merged", _source(one, its), found[one.number])
    return found[layer.number]


def _split_by_columns(run: Perturbation, mesh: Any) -> Iterator[tuple[FlatLayer, Part]]:
    """The perturbed layers whose columns are split over this mesh, in an order that all processes have.

    Layers whose weights FSDP2 has not gathered are left out: their norms are summed when they are gathered.
    """
    layers: list[Any] = run.registry.alive()
    for layer in layers:
        weight = layer.get_base_layer()._parameters.get("weight")
        if is_dtensor(weight) and weight.device_mesh == mesh and not layer.is_switched_off():
            part = part_of(weight)
            if part.by_columns:
                yield layer, part


def _source(layer: FlatLayer, part: Part) -> Source:
    """What the norms are computed from.

    Summed norms are reused for a whole optimizer step, or for a pass if steps are not seen. Their source has no
    addresses, because all processes must agree on when to sum again.
    """
    run, adapters = layer.perturbation, layer.active_lora_adapters()
    factors = [factor[name].weight for name in adapters for factor in (layer.lora_A, layer.lora_B)]
    tensors = [layer.get_base_layer().weight, *factors]
    scales = [float(layer.scaling[name]) for name in adapters]
    state = (torch.is_inference_mode_enabled(), *adapters, *scales, *(tensor._version for tensor in tensors))
    if part.by_columns:
        token = ANY_PASS if run.counts_steps else run.records.token()
        return Source(token, tensors, (*state, run.steps))
    return Source(run.records.token(), tensors, (*state, *(_local(tensor).data_ptr() for tensor in tensors)))


@torch.no_grad()
def _norms_of_part(layer: FlatLayer, part: Part) -> Tensor:
    """``||W'_i||`` over the columns of a part."""
    A, B = ([_local(f[name].weight) for name in layer.active_lora_adapters()] for f in (layer.lora_A, layer.lora_B))
    stored: Any = layer.get_base_layer().weight
    return norms_of_sum(layer, [stored], part.weight, A, B)


def _local(parameter: Any) -> Tensor:
    local: Tensor = parameter.to_local() if is_dtensor(parameter) else parameter
    return local
