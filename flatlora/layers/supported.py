"""Which layers can be perturbed, and the reason why others cannot."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora.layer import SVDConv2d, SVDLinear
from peft.tuners.lora import layer as lora
from peft.tuners.lora import variants
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear  # x W^T + b, written out
from transformers.pytorch_utils import Conv1D

from ..training.distributed import is_dtensor

# They add B A x to the base product, or something that tends to it. DoRA also rescales, see `additive.py`.
VARIANTS = (
    variants.ALoraLinearVariant,  # the row norms are those of the weight merged from the invocation on
    variants.BdLoraLinearVariant,
    variants.DoraLinearVariant,
    variants.DoraConv1dVariant,
    variants.DoraConv2dVariant,
    variants.DoraConv3dVariant,
    variants.MiCAEmbeddingVariant,
    variants.MiCALinearVariant,
    variants.MontecloraLinearVariant,  # its noise in A has mean zero and does not enter the row norms
    variants.QALoraLinearVariant,
    variants.VeloraLinearVariant,
    *([variants.KasaLinearVariant] if hasattr(variants, "KasaLinearVariant") else []),  # not in peft 0.20
)
LAYERS_OF_PEFT = (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d, SVDLinear, SVDConv2d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
STOCK_FORWARDS = {kind.forward for kind in (nn.Linear, Conv1D, nn.Embedding, FalconLinear, *CONVOLUTIONS)}


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUANTIZED = (  # by name, because peft defines some of them only if their package is installed
    "AqlmLoraLinear",
    "AwqLoraLinear",
    "EetqLoraLinear",
    "GPTQLoraLinear",
    "HqqLoraLinear",
    "IncLoraLinear",
    "Linear4bit",
    "Linear8bitLt",
    "TorchaoLoraLinear",
)
SPLIT = "its weight is split by tensor parallelism, and the row norms of a part are not those of the whole"
REASONS = {
    "LoraParallelLinear": SPLIT,
    "TeLinear": "Transformer Engine may normalize x inside the layer, and the noise must multiply what W multiplies",
    "ArrowLinearVariant": "Arrow mixes the adapters for each token, so there is no single merged weight",
}


def is_torch_tensor(weight: Tensor) -> bool:
    """Whether this is a tensor of numbers, and not of a package's own class (quantized)."""
    # subclasses of torch's own are sharded or fake tensors
    return type(weight) in (nn.Parameter, Tensor) or type(weight).__module__.startswith("torch.")


def check_changed_base(layer: Any, base: Any) -> None:
    """Check a base layer that was changed after the adapter was created.

    Raises:
        RuntimeError: the base layer is not the one that the adapter was created for, and cannot be perturbed.
    """
    reason = None
    weight = getattr(base, "weight", None)
    if isinstance(layer.get_base_layer(), CONVOLUTIONS):
        if not isinstance(weight, Tensor) or not is_torch_tensor(weight) or weight.dtype not in FLOATS:
            reason = "the weight of a convolution is not stored as floating-point numbers"
    elif isinstance(weight, Tensor) and is_torch_tensor(weight) and weight.dtype in FLOATS:
        shape = (layer.out_features, layer.in_features)
        if tuple(weight.shape) not in (shape, shape[::-1]):
            reason = f"its weight is of shape {tuple(weight.shape)}, and the adapter is for {shape}"
    if reason is not None:
        raise RuntimeError(
            f"the base layer of a {type(layer).__name__} is a {type(base).__name__} now, which is not the layer that "
            f"the adapter was created for, and it cannot be perturbed: {reason}. Change the base layer before the "
            "adapter is created, or call flatlora.detach(model) to train without noise."
        )


def is_quantized(peft_class: type) -> bool:
    """Whether this is a class of peft for layers whose base layer is quantized."""
    return peft_class.__module__.startswith("peft.tuners.lora.") and peft_class.__name__ in QUANTIZED


def unsupported(layer: Any, adapter: str) -> str | None:
    """Why this adapter of a LoRA layer cannot be perturbed, or None if it can."""
    peft_class, base = getattr(type(layer), "peft_class", type(layer)), layer.base_layer
    if getattr(base, "_hf_tp_plan", None) is not None or is_dtensor(getattr(base, "weight", None)):
        return f"{SPLIT}; FSDP2's fully_shard comes after the adapter"
    if "forward" in layer.__dict__ and not hasattr(layer, "_hf_hook"):
        return "its forward was replaced, as by X-LoRA, which mixes adapters for each token"
    if isinstance(base, BaseTunerLayer) and not isinstance(base, lora.ParamWrapper):
        return f"it is wrapped around another adapter layer ({type(base).__name__})"
    variant = type(layer.lora_variant.get(adapter))
    if adapter in layer.lora_variant and not issubclass(variant, VARIANTS):
        return REASONS.get(variant.__name__, f"{variant.__name__} of adapter {adapter!r} is not supported")
    if peft_class in LAYERS_OF_PEFT:
        return _unsupported_base(layer, base)
    if peft_class is lora.MultiheadAttention:
        return _unsupported_dtype(base.in_proj_weight)
    if peft_class is lora.ParamWrapper:
        return _unsupported_dtype(layer.get_param())
    if is_quantized(peft_class):
        return None
    return REASONS.get(peft_class.__name__, f"peft adapts it with {peft_class.__name__}, which is not supported")


def _unsupported_base(layer: Any, base: Any) -> str | None:
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return (
            # flat already if the attention as a whole is adapted
            None if hasattr(layer, "perturbation") else "torch's MultiheadAttention reads its weight without calling it"
        )
    if type(base).forward not in STOCK_FORWARDS and not hasattr(base, "embed_scale"):
        return f"{type(base).__name__} has a forward of its own"
    if "forward" in base.__dict__ and not hasattr(base, "_hf_hook"):  # accelerate's provides the weight
        return f"the forward of its {type(base).__name__} was replaced, as packages do that quantize x"
    return _unsupported_dtype(base.weight)


def _unsupported_dtype(weight: Tensor) -> str | None:
    return None if weight.dtype in FLOATS else f"its weight is stored as {weight.dtype}"
