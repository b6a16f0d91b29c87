"""The interface of a method. There are two kinds.

| kind           | the training forward runs at           | the method defines                                  |
| -------------- | -------------------------------------- | --------------------------------------------------- |
| `WeightNoise`  | W + sBA + eps, eps Gaussian            | `row_scale`: what the noise in a row is relative to |
| `FactorOffset` | W + s (B + E_B)(A + E_A) [+ s B_2 A_2] | `offsets`, `extra_products`, `before_step`, ...     |

A method is a frozen dataclass of its own settings. What changes during training is kept in `layer.offsets`, a dict of
tensors by (factor, adapter), and in a `MethodState`. Both are copied, pickled and saved with the model's perturbation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Offsets = dict[tuple[str, str], Tensor]  # by (factor, adapter), for example ("lora_B", "default")


class AdaptedLayer(Protocol):
    """What a method sees of a LoRA layer whose training is perturbed.

    Attributes:
        stream: index of the layer in the noise contract.
        offsets: the tensors that the method keeps for this layer.
        scaling, use_dora, lora_variant, lora_A, lora_B: peft's.
    """

    stream: int
    offsets: Offsets
    scaling: dict[str, float]
    use_dora: dict[str, bool]
    lora_variant: dict[str, Any]
    lora_A: Any  # nn.ModuleDict of nn.Linear or convolutions
    lora_B: Any

    def active_flat_adapters(self) -> list[str]:
        """Names of the adapters that are active and perturbed."""

    def get_base_layer(self) -> nn.Module:
        """The frozen layer."""

    def factor_weight(self, factor: str, adapter: str) -> Tensor:
        """The weight of a factor as its forward reads it, also where FSDP1, ZeRO-3 or a hook provides it."""


class Factors(NamedTuple):
    """The factors of one adapter in one layer."""

    name: str  # of the layer in the model
    layer: AdaptedLayer
    adapter: str
    # the model's parameters, which may be divided: `run.whole` has their values and gradients
    A: nn.Parameter  # (r, n), for a convolution (r, in, *kernel)
    B: nn.Parameter  # (m, r), for a convolution (m, r, 1, ...)

    @property
    def scaling(self) -> float:
        return self.layer.scaling[self.adapter]


class WholeParameters(Protocol):
    """Parameters as whole tensors, where a model may be divided among processes.

    All processes call a method of it for the same parameters, in the same order.
    """

    def shape(self, parameter: Tensor) -> torch.Size:
        """The whole shape."""

    def value(self, parameter: nn.Parameter) -> Tensor:
        """The whole value that the optimizer updates, possibly in higher precision than the forward's. Not a copy."""

    def has_gradient(self, parameter: nn.Parameter) -> bool: ...

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole gradient, None without one. It may have the scale of a GradScaler, and it may be clipped."""

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the whole value."""

    def average_gradients(self, like: nn.Parameter, tensors: Sequence[Tensor]) -> None:
        """Average `.grad` of tensors over the processes among which `like` is divided; nothing if it is whole."""

    def groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, with the model's parameters in them."""


class TrainingRun(Protocol):
    """What a method sees of the model that trains: its `Perturbation`."""

    @property
    def whole(self) -> WholeParameters: ...

    @property
    def rho(self) -> float: ...

    @property
    def rho_t(self) -> float: ...

    @property
    def ramp(self) -> float: ...

    @property
    def rhos(self) -> Mapping[str, float]: ...

    def rho_of(self, adapters: list[str], device: torch.device) -> float | Tensor:
        """The largest rho_t of these adapters, or what `perturbed(..., rho=...)` sets in this thread."""

    @property
    def seed(self) -> int: ...

    @property
    def method_state(self) -> Any: ...  # what `Method.make_state` returned

    @property
    def settings(self) -> Any: ...  # a `Settings`

    @property
    def diagnostics(self) -> Any: ...  # its `layers_perturbed`: numbers of the layers perturbed since the last step

    def draw(self, device: torch.device) -> tuple[Tensor, int]:
        """The key of the noise and the sample of the forward that runs."""

    def flat_layers(self) -> Iterator[tuple[str, Any]]: ...


class MethodState:
    """What a method remembers beside the tensors in `layer.offsets`. This one remembers nothing."""

    def state_dict(self) -> dict[str, Any] | None:
        """What a resumed run needs, or None."""
        return None

    def check(self, state: Any, shapes: Collection[tuple[int, ...]]) -> dict[str, Any] | None:
        """Check what `state_dict` returned before it was saved. Nothing is changed yet.

        Args:
            state: what was loaded from the file.
            shapes: shapes of the tensors that the method keeps in this model, with repetition.

        Returns:
            what `load_state_dict` takes.

        Raises:
            ValueError: an entry is wrong; the message names it.
        """
        if state is not None:
            raise ValueError("the method that this model trains with keeps no state, and the file has one")
        return None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from `state`, which `check` has returned."""


@dataclass(frozen=True)
class Method:
    """What both kinds have in common."""

    passes: ClassVar[int] = 1  # forward and backward passes of an optimizer step
    transforms: ClassVar[bool] = True  # can be used inside a transform of torch.func
    uses_gradients: ClassVar[bool] = False  # needs the whole gradients at each optimizer step

    def unsupported(self, layer: Any, adapter: str) -> str | None:
        """Why the method is not defined for this adapter of a LoRA layer, or None if it is."""
        return None

    def make_state(self) -> MethodState:
        """What the method remembers for one model."""
        return MethodState()

    def init_adapter(self, layer: AdaptedLayer, adapter: str, run: TrainingRun) -> None:
        """Called when `adapter` of a layer has become flat."""

    def before_step(self, run: TrainingRun, optimizer: Optimizer) -> None:
        """Called when the gradients are those that the optimizer is about to use.

        A step that is skipped because of an overflow does not call it.
        """

    def after_step(self, run: TrainingRun, optimizer: Optimizer) -> None:
        """Called when the optimizer has updated the parameters."""


@dataclass(frozen=True)
class WeightNoise(Method):
    """Gaussian noise in the merged weight.

    eps_ij = rho_t / sqrt(n) * row_scale(||W'_1||, ..., ||W'_m||)_i * z_ij
    """

    def row_scale(self, row_norms: Tensor) -> Tensor:
        """What the noise of each row is relative to, (m,), from the row norms of the merged weight, (m,)."""
        return row_norms

    @property
    def is_relative_to_row_norms(self) -> bool:
        """True if `row_scale` is the identity: kernels then compute the norms in the pass that adds the noise."""
        return type(self).row_scale is WeightNoise.row_scale

    def unsupported(self, layer: Any, adapter: str) -> str | None:
        if self.is_relative_to_row_norms or adapter in layer.lora_A:
            return None
        name = type(self).__name__
        return f"{name} needs the norms of all rows of the merged weight, and an embedding computes those it looks up"


@dataclass(frozen=True)
class FactorOffset(Method):
    """The forward runs at (A + E_A, B + E_B). A and B are not written; their gradients are those at that point."""

    uses_gradients: ClassVar[bool] = True

    def unsupported(self, layer: Any, adapter: str) -> str | None:
        name = type(self).__name__
        if layer.use_dora.get(adapter):
            return f"{name} is not defined for DoRA, whose weight is not a sum W + sBA"
        if adapter in layer.lora_variant:
            return f"{name} is not defined for {type(layer.lora_variant[adapter]).__name__}"
        return None if adapter in layer.lora_A else f"{name} is not defined for embeddings"

    def offsets(self, layer: AdaptedLayer, run: TrainingRun) -> Offsets:
        """E_A and E_B of the active adapters, with keys ("lora_A", adapter) and ("lora_B", adapter)."""
        active = layer.active_flat_adapters()
        return {
            (factor, adapter): offset
            for (factor, adapter), offset in layer.offsets.items()
            if factor in ("lora_A", "lora_B") and adapter in active
        }

    def extra_products(self, layer: AdaptedLayer, x: Tensor, run: TrainingRun) -> list[tuple[Tensor, Tensor, float]]:
        """Further low-rank products that the forward adds: (A_2, B_2, s) for each ``s (x A_2^T) B_2^T``."""
        return []


def trained_factors(run: TrainingRun) -> Iterator[Factors]:
    """The factors of the active flat adapters that have a gradient.

    Raises:
        RuntimeError: a factor is computed in each forward, so it has no gradient.
    """
    for name, layer in run.flat_layers():
        for adapter in layer.active_flat_adapters():
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if not (isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter)):
                if run.rho == 0:
                    continue
                raise RuntimeError(
                    f"{type(run.settings.method).__name__} needs the gradients of lora_A and lora_B, and one of "
                    f"those of {name!r} is computed in each forward (weight_norm, prune or another parametrization). "
                    "Remove the parametrization from the adapter, or use FlatLoraConfig, which needs no gradients."
                )
            if run.whole.has_gradient(A) or run.whole.has_gradient(B):
                yield Factors(name, layer, adapter, A, B)


def gradient(run: TrainingRun, parameter: nn.Parameter) -> Tensor:
    """The whole gradient of a parameter; zeros if it has none because it is frozen or this backward did not use it."""
    found = run.whole.gradient(parameter)
    return torch.zeros_like(run.whole.value(parameter)) if found is None else found
