"""Language models that answer: pairs of a prompt and an answer for training, and answers to prompts.

The loss is over the tokens of the answer and its end. Prompt and answer become tokens apart from one another, so that
the tokens of a prompt are those that the model reads when it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from .arguments import RecipeArguments

IGNORED = -100  # the label of a token without a loss
Pair = tuple[str, str]  # prompt, answer
Encoded = dict[str, list[int]]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)  # the form of Stanford Alpaca's prompts (Taori et al. 2023), which the papers name
LLAMA_2_7B = {  # of all tasks of the paper of Flat-LoRA (arXiv 2409.14396) with a language model
    "model": "meta-llama/Llama-2-7b-hf",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": "all-linear",
    "learning_rate": 5e-4,
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "batch_size": 32,
    "micro_batch_size": 2,
    "epochs": 2,
    "max_steps": -1,
    "max_length": 1024,
    "eval_samples": None,
    "rho": 0.05,
}
SIZES: dict[str, dict[str, int]] = {  # of the papers' models, for --estimate
    "llama-2-7b": dict(hidden_size=4096, intermediate_size=11_008, vocab_size=32_000),
    "llama-3.1-8b": dict(hidden_size=4096, intermediate_size=14_336, vocab_size=128_256, num_key_value_heads=8),
}


def encode(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> Encoded:
    """`input_ids` of prompt, answer and end, and `labels`, in which those of the prompt are ignored."""
    prompt = tokenizer(pair[0]).input_ids
    answer = tokenizer(pair[1], add_special_tokens=False).input_ids
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def encode_short(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int, limit: int | None = None
) -> list[Encoded]:
    """The first `limit` pairs of at most `max_length` tokens.

    Raises:
        ValueError: all are longer.
    """
    kept: list[Encoded] = []
    for pair in pairs:
        if limit is not None and len(kept) == limit:
            break
        encoded = encode(tokenizer, pair)
        if len(encoded["input_ids"]) <= max_length:
            kept.append(encoded)
    if not kept:
        raise ValueError(f"--max_length must leave at least one example, got {max_length} and longer ones only")
    return kept


def collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Encoded]], dict[str, Tensor]]:
    """Makes a batch, padded on the right."""

    def collate(rows: list[Encoded]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        padded = {"input_ids": tokenizer.pad_token_id, "labels": IGNORED, "attention_mask": 0}
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
            for name, value in padded.items()
        }

    return collate


@torch.inference_mode()
def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 32,
    special_tokens: bool = True,
    **options: Any,
) -> list[str]:
    """What the model writes after each prompt, in their order.

    Args:
        batch_size: prompts of a batch, which have similar lengths.
        special_tokens: whether the tokenizer adds its own; False where a chat template has added them.
        options: of `generate`: greedy by default; `do_sample`, `temperature`, `top_p`, `num_beams`.
    """
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    found = [""] * len(prompts)
    options = {"do_sample": False, **options}
    for start in tqdm(range(0, len(order), batch_size), desc="answers", leave=False):
        chosen = order[start : start + batch_size]
        inputs = tokenizer(
            [prompts[k] for k in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=special_tokens,
            return_token_type_ids=False,
        ).to(device)
        out = model.generate(
            **inputs, max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=tokenizer.pad_token_id, **options
        )
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for k, text in zip(chosen, texts, strict=True):
            found[k] = text
    return found


def llama_micro_batch(args: RecipeArguments, size: str) -> tuple[nn.Module, dict[str, Any]]:
    """A Llama of one of `SIZES` and a micro-batch, for the estimate."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES[size]), dtype=getattr(torch, args.dtype))
    tokens = torch.ones(args.micro_batch_size or args.batch_size, args.max_length, dtype=torch.long)
    return model, {"input_ids": tokens, "attention_mask": tokens, "labels": tokens, "use_cache": False}
