"""A LoRA layer whose training forward runs at W + sBA + eps: when it is perturbed, and by which path.

A layer from peft keeps its class, and gets `FlatLayer` in front of it. So `isinstance` and all operations of peft work
as before. A forward that is not perturbed is peft's own forward.

| path              | layers                                      | how eps enters                       |
| ----------------- | ------------------------------------------- | ------------------------------------ |
| fused.py          | linear, also with bitsandbytes' 4 bits,     | one autograd node computes the layer |
|                   | any adapters or one with DoRA, no hooks     |                                      |
| base_product.py   | linear, convolution, bitsandbytes 4 bits    | the base layer's product has W + eps |
| additive.py       | other DoRA, other quantized layers,         | x eps^T is added to peft's output    |
|                   | embeddings, a base layer changed later      |                                      |
| attention.py      | torch's MultiheadAttention                  | eps is added to peft's merged weight |
| experts.py        | parameters (experts of a mixture)           | the same                             |
| tensor_parallel   | linear, split over processes                | the product of a part has W + eps    |
| compiled.py       | linear, while `torch.compile` traces        | an operator computes the product     |
| functorch.py      | inside a transform of torch.func or a trace | W + eps is computed as a tensor      |
| factor_offsets.py | methods that move A and B instead           | A + E_A and B + E_B                  |
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from ..methods.base import FactorOffset, Offsets, WeightNoise
from ..ops.registry import backward_began, register
from ..training.distributed import is_dtensor
from ..training.forward_passes import tensors
from ..training.forward_records import Record
from ..training.perturbation import Perturbation
from . import additive, base_product, compiled, factor_offsets, functorch, fused, tensor_parallel
from .module_weights import refuse_fsdp1, whole_weight
from .row_norms import NormCache, row_norms
from .supported import SPLIT, check_changed_base, is_torch_tensor
from .weights import LayerWeights

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer

    class _PeftLayer(nn.Module, LoraLayer):
        """A LoRA layer of peft, of which these attributes are not typed as they are used."""

        disable_adapters: bool
        in_features: int
        out_features: int
        lora_A: Any
        lora_B: Any
        lora_dropout: Any
        lora_embedding_A: Any
        lora_embedding_B: Any
        lora_magnitude_vector: Any
        lora_variant: dict[str, Any]

else:
    # at run time the class that peft made follows in the bases
    _PeftLayer = object

Forward = Callable[..., Any]

OWN_ATTRIBUTES = (  # of a flat layer, beside those of the class that peft made
    *("perturbation", "stream", "number", "address", "flat_adapters", "offsets", "strict", "user_thread"),
    *("lock", "input_dtype", "_norms", "_base_forward", "_kept"),
)


def flat_layers(model: nn.Module) -> Iterator[FlatLayer]:
    """The flat layers of a model."""
    return (module for module in model.modules() if isinstance(module, FlatLayer))


class FlatLayer(_PeftLayer):
    """Mix-in in front of the class of a LoRA layer.

    Attributes:
        perturbation: the perturbation of the model.
        stream: index of the layer in the noise contract.
        number: number of the layer in `ops.registry`.
        address: (number, stream) as a tensor, for compiled code.
        flat_adapters: the adapters whose training is perturbed here.
        offsets: the tensors that the method keeps here, by (factor, adapter).
        strict: raise an error if kernels bypass this layer.
        lock: an RLock. Some forwards change modules for the length of a call, which other threads must not see.
        input_dtype: dtype of the last input of a layer whose weight is not dense.
        user_thread: in a replica of `nn.DataParallel`, the thread of the user's code.
    """

    peft_class: ClassVar[type]
    weights_class: ClassVar[type[LayerWeights]] = LayerWeights

    perturbation: Perturbation
    stream: int
    number: int
    address: Tensor
    flat_adapters: set[str]
    offsets: Offsets
    strict: bool
    lock: Any
    user_thread: int
    input_dtype: torch.dtype
    _norms: NormCache
    _base_forward: Any

    # ---- the forward ----

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        peft_forward = super().forward
        if torch.compiler.is_compiling():
            return self._forward_in_compiler(peft_forward, x, *args, **kwargs)
        self.perturbation.passes.note_layer(self.number)
        with self.lock:
            return self._eager_forward(peft_forward, x, *args, **kwargs)

    def _eager_forward(self, peft_forward: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters or self.merged or not self.active_flat_adapters():
            return self._clean_forward(peft_forward, x, *args, **kwargs)
        record = self._new_record()
        if not record.perturbed:
            return self._clean_forward(peft_forward, x, *args, **kwargs)
        _refuse_mixed_batch(kwargs)
        with self.perturbation.records.running(record):
            return self._perturbed_forward(peft_forward, x, *args, **kwargs)

    def _perturbed_forward(self, peft_forward: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.perturbation.diagnostics.layers_perturbed.add(self.number)
        if functorch.is_transformed():
            return functorch.forward(self, peft_forward, x, *args, **kwargs)
        operands = None if args or kwargs else fused.operands(self)
        if operands is not None:
            return fused.forward(self, operands, x)
        adapters = [name for name in self.active_lora_adapters() if self.use_dora.get(name) and name in self.lora_A]
        unwrapped = [self.lora_A[name] for name in adapters if self.lora_A[name].weight.ndim < 2]
        refuse_fsdp1("DoRA", unwrapped, "Set use_orig_params=False, or use FSDP2.")
        out = self.method_forward(peft_forward, x, *args, **kwargs)
        self._report_backward(out)
        return out

    def method_forward(self, peft_forward: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """peft's forward with the perturbation of the method."""
        if tensor_parallel.is_split(self.get_base_layer()):
            # the weight may have been split after the adapter was made
            tensor_parallel.check(self)
        if isinstance(self.perturbation.settings.method, FactorOffset):
            return factor_offsets.forward(self, peft_forward, x, *args, **kwargs)
        return self.noisy_forward(peft_forward, x, *args, **kwargs)

    def noisy_forward(self, peft_forward: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """peft's forward with Gaussian noise in the merged weight."""
        base: Any = self.get_base_layer()
        if isinstance(base, nn.Embedding):
            return additive.add_row_noise(self, peft_forward(x, *args, **kwargs), x)
        if tensor_parallel.is_split(base):
            return tensor_parallel.forward(self, peft_forward, x, *args, **kwargs)
        if self.base_has_changed():
            return additive.add_noise(self, peft_forward(x, *args, **kwargs), x, dtype_of=x)
        if any(self.use_dora.get(name) for name in self.active_lora_adapters()):
            return additive.add_noise(self, peft_forward(x, *args, **kwargs), x, dtype_of=base.weight)
        return base_product.forward(self, peft_forward, x, *args, **kwargs)

    def _clean_forward(self, peft_forward: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self.note_run()
            if not (self.training and self.get_base_layer().training):
                self.perturbation.diagnostics.layers_in_eval.add(self.number)
        return peft_forward(x, *args, **kwargs)

    def _forward_in_compiler(self, peft_forward: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        compiled.note_compiling(self.perturbation.number)
        if self.is_switched_off():
            return peft_forward(x, *args, **kwargs)
        training = self.training and self.get_base_layer().training
        perturbed = self.perturbation.records.compiled_forward_is_perturbed(training)
        if perturbed is None:
            return self._graph_break(x, *args, **kwargs)
        if not perturbed:
            return peft_forward(x, *args, **kwargs)
        _refuse_mixed_batch(kwargs)
        return compiled.forward(self, x) if compiled.takes(self) else self._graph_break(x, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def _graph_break(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.forward(x, *args, **kwargs)

    # ---- when ----

    def is_switched_off(self) -> bool:
        """Whether no forward is perturbed: rho is 0, the adapters are disabled or merged."""
        return self.rho() == 0 or self.disable_adapters or self.merged

    def _new_record(self) -> Record:
        # an adapter that is injected after model.eval() is in training mode, but its base layer is not
        training = self.training and self.get_base_layer().training
        thread = self.__dict__.get("user_thread")
        return self.perturbation.records.of_forward(self.number, training, self.rho() > 0, thread)

    def rho(self) -> float:
        """The largest rho of the flat adapters that are active here; above 0 also where `perturbed` sets one."""
        flat, rhos = self.active_flat_adapters(), self.perturbation.schedule.rhos
        return max(rhos[name] for name in flat) or self.perturbation.overrides.chosen_rho() if flat else 0.0

    def active_lora_adapters(self) -> list[str]:
        """Names of the active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.scaling]

    def active_flat_adapters(self) -> list[str]:
        """Names of the adapters that are active and perturbed."""
        return [name for name in self.active_lora_adapters() if name in self.flat_adapters]

    # ---- the noise ----

    def noise(self) -> tuple[Tensor, Tensor]:
        """Standard deviation of each row of eps, (m,), and the key of the noise, for the forward that runs."""
        if is_dtensor(getattr(self.get_base_layer(), "weight", None)):
            raise RuntimeError(f"the layer cannot be perturbed: {SPLIT}. Use DDP, FSDP or ZeRO.")
        key, _ = self.perturbation.draw(self.weights.device)
        return self.row_std(self.row_norms(), self.weights.columns), key

    def compiled_noise(self) -> tuple[Tensor, Tensor]:
        """`noise`, called at run time by code that was compiled as perturbed."""
        with self.lock, self.perturbation.records.running(self._new_record()):
            return self.noise()

    def row_std(self, norms: Tensor, columns: int) -> Tensor:
        """Standard deviation of each row of eps, (m,), from the row norms of the merged weight, (m,)."""
        method = self.perturbation.settings.method
        assert isinstance(method, WeightNoise)
        row_std: Tensor = method.row_scale(norms) * self.relative_std(columns, norms.device)
        return row_std

    def relative_std(self, columns: int, device: torch.device) -> Any:
        """rho_t / sqrt(n): the ratio of the standard deviation of the noise in a row to the row norm.

        A number, or a tensor of shape () where a CUDA graph is being captured on this device.
        """
        return self.perturbation.rho_of(self.active_flat_adapters(), device) / math.sqrt(columns)

    def row_norms(self) -> Tensor:
        """``||W'_i||`` of the merged weight, (m,); with DoRA the absolute value of the magnitude vector."""
        return row_norms(self)

    # ---- the weight ----

    @property
    def weights(self) -> LayerWeights:
        """W, A and B."""
        return self.weights_class(self)

    def anchor(self) -> Any:
        """The object that identifies W: layers that share it share their noise."""
        return self.weights.anchor

    def factor_weight(self, factor: str, adapter: str) -> Tensor:
        """The weight of a factor as its forward reads it, also where FSDP1, ZeRO-3 or a hook provides it."""
        return whole_weight(getattr(self, factor)[adapter])

    def merged_parts(self) -> list[FlatLayer]:
        """The flat layers whose factors this forward uses: this one, and those adapted inside it."""
        return [self]

    def remember_base(self) -> None:
        """Store the forward of the base layer, whose product this library computes while it stays the same."""
        self.__dict__["_base_forward"] = type(self.get_base_layer()).forward

    def base_has_changed(self) -> bool:
        """Whether the base layer computes its product in another way now (QAT, float8, quantization, a patch).

        Raises:
            RuntimeError: it does, and the new weight cannot be perturbed.
        """
        base = self.get_base_layer()
        # accelerate's forward only provides the weight
        replaced = "forward" in base.__dict__ and "_old_forward" not in base.__dict__
        if not replaced and type(base).forward is self._base_forward and self._has_known_weight(base):
            return False
        check_changed_base(self, base)
        return True

    def _has_known_weight(self, base: nn.Module) -> bool:
        weight = base._parameters.get("weight")
        # without a weight, a parametrization or FSDP provides it
        return weight is None or is_torch_tensor(weight)

    # ---- what is reported ----

    def on_backward(self) -> None:
        """Called when a backward pass reaches the layer, see `ops.registry`."""
        self.note_run()
        self.perturbation.records.note_backward()

    def note_run(self) -> None:
        """Note that this layer takes part in the coming optimizer step."""
        self.perturbation.diagnostics.note_run(self.number)

    def _report_backward(self, out: Any) -> None:
        number = self.number

        # an output may be saved without its hooks
        @unserializable_hook  # type: ignore[untyped-decorator]  # torch's
        def hook(_grad: Tensor) -> None:
            backward_began(number)

        for tensor in tensors(out):
            if tensor.requires_grad:
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]  # torch's

    # ---- registration ----

    def enroll(self) -> None:
        """Register a layer that has become flat, or a copy of one."""
        self.perturbation.registry.add(self)
        self.__dict__.update(number=register(self), lock=threading.RLock())
        self._set_address()

    def join(self, perturbation: Perturbation, stream: int) -> None:
        """Take part in a perturbation, with this noise stream."""
        self.__dict__.update(perturbation=perturbation, stream=stream)
        perturbation.registry.add(self)
        self._set_address()

    def _set_address(self) -> None:
        self.__dict__["address"] = torch.tensor([self.number, self.stream], dtype=torch.int64, device="cpu")


def _refuse_mixed_batch(kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            "adapter_names gives each row of the batch its own merged weight, and the noise is relative to one merged "
            "weight: call the model once per adapter, or inside flatlora.unperturbed(model)"
        )
