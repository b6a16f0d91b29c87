"""What can be perturbed, and why the rest cannot."""

from __future__ import annotations

from typing import Any

from peft.tuners.adalora.layer import SVDConv2d, SVDLinear
from peft.tuners.lora import layer as lora
from peft.tuners.lora import variants
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .spread import is_dtensor

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
LAYERS_OF_PEFT = (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d, SVDLinear, SVDConv2d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SPLIT = "its weight is split by tensor parallelism, and the row norms of a part are not those of the whole"
STOCK_FORWARDS = {kind.forward for kind in (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)}


def unsupported(layer: Any, adapter: str) -> str | None:
    """Why this adapter of a LoRA layer cannot be perturbed, or None if it can."""
    plain = getattr(type(layer), "plain_class", type(layer))
    if plain not in LAYERS_OF_PEFT:
        return f"peft adapts it with {plain.__name__}, which is not supported"
    if "forward" in layer.__dict__ and not hasattr(layer, "_hf_hook"):
        return "its forward was replaced, as X-LoRA does, whose mixture of adapters is another one for each token"
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
