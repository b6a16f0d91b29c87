"""Base models: packaged ones by a short name, local folders, or names on the hub; in 4 bits if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common.dinov2 import dinov2_folder
from common.models import minilm_folder, smollm2_folder
from common.tiny_t5 import tiny_t5_folder
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .arguments import RecipeArguments
from .files import announce

PACKAGED = {"minilm": minilm_folder, "smollm2": smollm2_folder, "dinov2": dinov2_folder, "tiny-t5": tiny_t5_folder}
HEADS = ("classifier", "score")  # the new, trained layer of a classifier, by the names that transformers gives it


def source(name: str) -> str:
    """What `from_pretrained` takes; prints what will be downloaded."""
    if name in PACKAGED:
        return str(PACKAGED[name]())
    announce(name, "model")
    return name


def loading(args: RecipeArguments) -> dict[str, Any]:
    """Arguments of `from_pretrained`: the dtype, and the quantization of QLoRA (arXiv 2305.14314)."""
    dtype = getattr(torch, args.dtype)
    if not args.load_in_4bit:
        return {"dtype": dtype}
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*HEADS, "lm_head"],
    )
    return {"dtype": dtype, "quantization_config": four_bit}


def tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; one without a padding token pads with its end."""
    made = AutoTokenizer.from_pretrained(source(name), **options)
    if made.pad_token is None:
        made.pad_token = made.eos_token
    return made


def encoder(args: RecipeArguments, labels: int, seed: int) -> PreTrainedModel:
    """A text classifier whose new head the seed sets; with one label, a regression."""
    torch.manual_seed(seed)
    kind = "regression" if labels == 1 else "single_label_classification"
    made = AutoModelForSequenceClassification.from_pretrained(
        source(args.model), num_labels=labels, problem_type=kind, **loading(args)
    )
    return head_in_float32(made)


def head_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a head in float32, which casts what goes into it.

    The head is trained as it is. In bfloat16, with 8 bits of mantissa, most steps of the optimizer would round away.
    """
    for name in HEADS:
        if (head := getattr(model, name, None)) is not None:
            head.float().register_forward_pre_hook(_as_float32)
    return model


def _as_float32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def causal(args: RecipeArguments) -> PreTrainedModel:
    """A language model."""
    return AutoModelForCausalLM.from_pretrained(source(args.model), **loading(args))


def seq2seq(args: RecipeArguments) -> PreTrainedModel:
    """An encoder and decoder."""
    return AutoModelForSeq2SeqLM.from_pretrained(source(args.model), **loading(args))


def device() -> torch.device:
    """Where the Trainer puts a model."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def last_run(folder: Path) -> Path | None:
    """The adapter that a run has saved, or None."""
    adapter = folder / "adapter"
    return adapter if (adapter / "adapter_model.safetensors").exists() else None
