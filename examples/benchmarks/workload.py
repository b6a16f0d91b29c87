"""The models that the benchmarks train, and one training step of each method."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import measure  # noqa: F401  (finds the examples' own modules)
import torch
from add_remove import AddAndRemove
from common.models import load_model, resolve_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flatlora import (
    BarConfig,
    BiLoraConfig,
    EFMLoraConfig,
    FlatLoraConfig,
    FMLoraConfig,
    LoraSamConfig,
    RwpConfig,
    ascent,
    get_flat_peft_model,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
RHO = 0.05
SIZES = {
    # The width of SmolLM2-135M with a fifth of its layers and a sixth of its vocabulary (49,152), so that the output
    # layer takes no larger part of the step than it does there. Random weights, tied embeddings as there.
    "llama6": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=8192, tie_word_embeddings=True,
    ),
    "llama2": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=1024, tie_word_embeddings=True,
    ),
    "tiny": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, tie_word_embeddings=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        model: one of `SIZES`, "smollm2" for the real SmolLM2-135M, or what `from_pretrained` takes.
        tokens: of one step, in sequences of `length` (one shorter sequence if there are fewer).
        r: LoRA rank, in all linear layers but the output.
        dtype: of the base model.
        adapters: dtype of the LoRA factors; peft keeps fp32 ones beside a bf16 base unless asked otherwise.
        checkpointing: every layer's activations are computed again in backward.
        kind: of adapters or of weights, one of `KINDS`.
    """

    model: str = "llama6"
    tokens: int = 512
    length: int = 128
    r: int = 8
    dtype: str = "bf16"
    adapters: str = "fp32"
    checkpointing: bool = False
    kind: str = "plain"


# plain, LoRA dropout of 0.1, DoRA, weights in the 4 bits of bitsandbytes (NF4), two active adapters
KINDS = ("plain", "dropout", "dora", "4bit", "two adapters")


def base_model(name: str, dtype: str, device: torch.device, seed: int = 0) -> nn.Module:
    """The model that is adapted. Attention is eager on CPUs: for short sequences the faster one there."""
    if name not in SIZES:
        return load_model(resolve_model(name), DTYPES[dtype], device)
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SIZES[name], max_position_embeddings=8192, attn_implementation="eager" if device.type == "cpu" else "sdpa"
    )
    return LlamaForCausalLM(config).to(device, DTYPES[dtype])


class Trained:
    """A copy of the model, adapted, with its data and its optimizer; a call makes one training step."""

    def __init__(self, base: nn.Module, work: Workload, seed: int = 0) -> None:
        self.device = next(base.parameters()).device
        torch.manual_seed(seed)
        base = copy.deepcopy(base)
        if work.kind == "4bit":
            quantize(base)
        with warnings.catch_warnings():  # transformers 5.23 renames checkpointing, peft 0.21 does not
            warnings.simplefilter("ignore", FutureWarning)
            self.model = self.adapt(base, lora_options(work), autocast_adapter_dtype=work.adapters == "fp32")
            if work.kind == "two adapters":
                self.add_second(work)
            if work.checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        with torch.no_grad():  # B is zero at first, and nothing else would depend on A
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=1e-3)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        length = min(work.length, work.tokens)
        shape = (work.tokens // length, length)
        self.tokens = torch.randint(base.config.vocab_size, shape).to(self.device)
        self.seed = seed

    def adapt(self, base: nn.Module, options: dict, **kwargs) -> PeftModel:
        return get_peft_model(base, LoraConfig(**options), **kwargs)

    def add_second(self, work: Workload) -> None:
        """Add a second adapter of the same configuration; both are active and trained."""
        config = copy.deepcopy(self.model.peft_config["default"])
        self.model.add_adapter("second", config, autocast_adapter_dtype=work.adapters == "fp32")
        self.model.base_model.set_adapter(["default", "second"])

    def loss(self) -> Tensor:
        return self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss

    def gradients(self) -> None:
        """Forward and backward: leaves a gradient in each trainable parameter."""
        self.loss().backward()

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def frozen(self) -> dict[str, Tensor]:
        """The weights under the adapters, by name."""
        return {name: p.detach() for name, p in self.model.named_parameters() if name.endswith("base_layer.weight")}


def lora_options(work: Workload) -> dict:
    options = {"r": work.r, "lora_alpha": 2 * work.r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return options | {"dropout": {"lora_dropout": 0.1}, "dora": {"use_dora": True}}.get(work.kind, {})


def quantize(model: nn.Module) -> None:
    """Replace the linear layers, except for the output layer, by layers of bitsandbytes with 4 bits."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer is model.get_output_embeddings():
            continue
        dtype = layer.weight.dtype
        new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, dtype)
        parameter = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        new.weight = parameter.to(layer.weight.device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    model.is_loaded_in_4bit = True


class Lora(Trained):
    """Plain LoRA: the baseline."""


class FlatLora(Trained):
    """This library at full strength, one noise sample per step."""

    def adapt(self, base, options, **kwargs):
        config = FlatLoraConfig(rho=RHO, schedule="constant", seed=0, **options)
        return get_flat_peft_model(base, config, **kwargs)


class Family(Trained):
    """Another method of this library, by its configuration."""

    config: type
    settings: dict = {}

    def adapt(self, base, options, **kwargs):
        return get_flat_peft_model(base, self.config(schedule="constant", **self.settings, **options), **kwargs)


class EFMLora(Family):
    config = EFMLoraConfig


class FMLora(Family):
    config = FMLoraConfig

    def gradients(self):
        with ascent(self.model):
            self.loss().backward()
        self.loss().backward()


class LoraSam(FMLora):
    config = LoraSamConfig


class Rwp(Family):
    config, settings = RwpConfig, {"seed": 0}


class RwpAdapter(Family):
    config, settings = RwpConfig, {"seed": 0, "space": "adapter"}


class BiLora(Family):
    config = BiLoraConfig


class Bar(Family):
    config = BarConfig


class AddRemove(Trained):
    """Noise written into the weights before the forward and subtracted after the backward."""

    def __init__(self, base, work, seed=0):
        super().__init__(base, work, seed)
        self.scheme = AddAndRemove(self.model, RHO, seed)

    def gradients(self):
        with self.scheme.noise():
            self.loss().backward()


class TwoPasses(Trained):
    """LoRA-SAM: the gradient at the factors moved by rho along their own gradient."""

    @torch.no_grad()
    def gradients(self):
        with torch.enable_grad():
            self.loss().backward()
        gradients = [p.grad for p in self.parameters]
        norm = torch.nn.utils.get_total_norm(gradients)
        before = [p.clone() for p in self.parameters]
        torch._foreach_mul_(gradients, RHO / (norm + 1e-12))
        torch._foreach_add_(self.parameters, gradients)
        self.optimizer.zero_grad()
        del gradients
        with torch.enable_grad():
            self.loss().backward()
        torch._foreach_copy_(self.parameters, before)


# "lora again" is a second copy of the baseline: what two equal things differ by on this machine.
METHODS: dict[str, Callable[[nn.Module, Workload, int], Trained]] = {
    "lora": Lora,
    "lora again": Lora,
    "flat": FlatLora,
    "add and remove": AddRemove,
    "two passes": TwoPasses,
    "efmlora": EFMLora,
    "fmlora": FMLora,
    "lora-sam": LoraSam,
    "rwp": Rwp,
    "rwp adapter": RwpAdapter,
    "bilora": BiLora,
    "bar": Bar,
}
FLAT_LORA = ("lora", "lora again", "flat", "add and remove", "two passes")
