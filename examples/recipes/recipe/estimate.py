"""Memory and time of a run on an 80 GB GPU, computed and not measured: counted bytes and operations.

The model is made on the meta device, where tensors have a shape and no memory, with plain LoRA, and runs one
micro-batch forward and backward. Counted are the bytes of its weights, of the adapters with their gradients and AdamW's
moments, of what autograd saves, and the operations of the products. Flat-LoRA saves no more than LoRA; it reads W once
more per forward and backward. The time of a batch too small to fill the GPU is longer than this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from .arguments import RecipeArguments, optimizer_steps
from .models import HEADS

PEAK = 312e12  # dense bf16 operations per second of an A100 (NVIDIA's data sheet)
USED = 0.4  # share of the peak that a training step is taken to reach
BANDWIDTH = 2.0e12  # bytes per second of its memory (the same data sheet)
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes per weight: half a byte, and scales of 8 bits per 64, of 32 per 64 * 256


@dataclass(frozen=True)
class Estimate:
    """What a run would take. Bytes, and seconds of all optimizer steps.

    Attributes:
        saved: by autograd, for one micro-batch.
        work: floating-point operations of one micro-batch, forward and backward.
    """

    weights: int
    adapters: int
    saved: int
    work: int
    steps: int
    micro_batches: int
    noise_seconds: float

    @property
    def bytes(self) -> int:
        return self.weights + self.adapters + self.saved

    @property
    def seconds(self) -> float:
        return self.steps * self.micro_batches * (self.work / (PEAK * USED) + self.noise_seconds)

    def __str__(self) -> str:
        gib = [value / 2**30 for value in (self.bytes, self.weights, self.adapters, self.saved)]
        return (
            "Computed, not measured, for one A100 of 80 GB: {:.1f} GiB (weights {:.1f}, adapters with AdamW {:.2f}, "
            "activations {:.1f}), ".format(*gib)
            + f"{self.steps} steps of {self.micro_batches} micro-batches in {self.seconds / 3600:.2g} hours "
            f"at {USED:.0%} of {PEAK / 1e12:.0f} TFLOP/s. Methods with two passes take twice the time."
        )


def estimate(
    make: Callable[[], tuple[nn.Module, Mapping[str, Any]]], args: RecipeArguments, examples: int, **more: Any
) -> Estimate:
    """The estimate for a model.

    Args:
        make: returns the base model in the dtype of training, and one micro-batch with labels. It is called under
            `torch.device("meta")`.
        examples: of the training data.
        more: further fields of LoraConfig.
    """
    names = args.target_modules
    targets = names if names == "all-linear" else names.split(",")
    with torch.device("meta"):
        base, inputs = make()
        small = _quantized(base) if args.load_in_4bit else set()
        weights = sum(round(NF4 * p.numel()) if p in small else p.nbytes for p in base.parameters())
        model = get_peft_model(base, LoraConfig(r=args.r, target_modules=targets, **more)).train()
        adapters = sum(16 * p.numel() for p in model.parameters() if p.requires_grad)  # value, gradient, two moments
        adapted = sum(m.get_base_layer().weight.numel() for m in model.modules() if hasattr(m, "lora_A"))
        saved, work = _counted(model, inputs)
    micro = args.micro_batch_size or args.batch_size
    steps = optimizer_steps(args, examples)
    # W is read, W + eps written and read, in the forward and in the backward: 3 * 2 bytes, twice
    return Estimate(weights, adapters, saved, work, steps, args.batch_size // micro, 12 * adapted / BANDWIDTH)


def _quantized(model: nn.Module) -> set[nn.Parameter]:
    """The weights that bitsandbytes stores in 4 bits: of linear layers, but not of a head."""
    named = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    return {m.weight for name, m in named if isinstance(m, nn.Linear) and name not in (*HEADS, "lm_head")}


def _counted(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, int]:
    """(bytes that autograd saves besides parameters, operations) of a forward and a backward."""
    kept: dict[int, Any] = {}  # storages, which several saved tensors may share

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    mode = FakeTensorMode()  # meta tensors that model code does not ask for values
    fake = {name: mode.from_tensor(p) for name, p in [*model.named_parameters(), *model.named_buffers()]}
    own = {p.untyped_storage()._cdata for p in fake.values()}
    given = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    with mode, FlopCounterMode(display=False) as counter, saved_tensors_hooks(pack, lambda tensor: tensor):
        functional_call(model, fake, kwargs=given).loss.backward()
    return sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops()
