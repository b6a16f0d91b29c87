"""Continued training, merging and serving: train, save, load, train on, merge, save; each copy answers the same.

    python examples/recipes/continue_training.py                                 # SmolLM2 on packaged movie reviews
    python examples/recipes/continue_training.py --method efmlora --dataset first.jsonl --more second.jsonl

`flatlora.load` gives the saved adapter with the noise that it was trained with. After the second training the adapter
is saved, and the merged model too, and both are loaded again, by peft and transformers as they are. At the end the
commands are printed that serve them, by llama.cpp and by vLLM. A file of one's own has a column `text`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from recipe import files, models
from recipe.arguments import RecipeArguments, parse
from recipe.estimate import estimate
from recipe.logits import difference, logits, nll
from recipe.methods import adapt
from recipe.results import run_all
from recipe.training import fit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import flatlora


@dataclass
class Arguments(RecipeArguments):
    """Two trainings of one adapter, then merging."""

    more: str = field(default="", metadata={"help": "data of the second training; default: the other half"})
    model: str = "smollm2"
    dataset: str = "movie"
    max_steps: int = 12
    batch_size: int = 4
    max_length: int = 48
    learning_rate: float = 1e-3
    eval_samples: int | None = 64
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paper:
            raise ValueError("--paper must be left out: no paper has settings for this recipe")


def load(args: Arguments) -> tuple[list[str], list[str], list[str]]:
    """(texts of the first training, of the second, of the test)."""
    if args.dataset == "movie":
        train, test = files.movie_reviews(args.train_samples or 1024, args.eval_samples)
        texts = [[f"Review: {row['text']}\nSentiment: {row['label']}" for row in rows] for rows in (train, test)]
    else:
        texts = [[str(row["text"]) for row in rows] for rows in files.splits(args.dataset, ["text"])]
    first, test = texts[0][: args.train_samples], texts[1][: args.eval_samples]
    if args.more:
        return first, [str(row["text"]) for row in files.load_rows(args.more, ["text"])], test
    return first[: len(first) // 2], first[len(first) // 2 :], test


def micro_batch(args: Arguments) -> tuple[nn.Module, dict[str, Any]]:
    """A model of SmolLM2-135M's sizes and a micro-batch, for the estimate."""
    sizes = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
    config = LlamaConfig(vocab_size=49_152, num_key_value_heads=3, tie_word_embeddings=True, **sizes)
    tokens = torch.ones(args.micro_batch_size or args.batch_size, args.max_length, dtype=torch.long)
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    return model, {"input_ids": tokens, "labels": tokens, "use_cache": False}


def serving(merged: Path, adapter: Path, base: str) -> str:
    """Commands that hand the models over; see the page on recipes of the documentation for which were run."""
    at = [shlex.quote(str(path)) for path in (merged, adapter)]
    return f"""\
llama.cpp, the merged model, or the adapter beside the base model:
  python convert_hf_to_gguf.py {at[0]} --outfile merged.gguf --outtype bf16
  llama-cli -m merged.gguf -p "Review: a fine film"
  python convert_lora_to_gguf.py {at[1]} --base {shlex.quote(base)} --outfile adapter.gguf
  llama-cli -m base.gguf --lora adapter.gguf -p "Review: a fine film"
vLLM:
  vllm serve {at[0]}
  vllm serve {shlex.quote(base)} --enable-lora --lora-modules trained={at[1]}"""


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(Arguments, {"": {}}, arguments)
    if args.estimate:
        print(estimate(lambda: micro_batch(args), args, 2 * args.batch_size * args.max_steps))
        return []
    first, second, test = load(args)
    tokenizer = models.tokenizer(args.model)

    def collate(texts: list[str]) -> dict[str, Tensor]:
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=args.max_length)
        batch.pop("token_type_ids", None)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    batches = [collate(test[k : k + 16]) for k in range(0, len(test), 16)]

    def run(method: str, seed: int, folder: Path) -> dict[str, float]:
        found = {"base": logits(models.causal(args), batches)}  # of a copy: evaluation may repack 4-bit weights
        if models.last_run(folder / "first") is None:
            model = adapt(models.causal(args), method, args, seed, task_type="CAUSAL_LM")
            fit(model, method, args, folder / "first", seed, first, collate)
        saved, again = folder / "first" / "adapter", models.causal(args)
        if method == "lora":
            model = PeftModel.from_pretrained(again, saved, is_trainable=True)
        else:
            model = flatlora.load(again, str(saved))  # with the noise's settings
        found["first"] = logits(PeftModel.from_pretrained(models.causal(args), saved), batches)
        trained = fit(model, method, args, folder, seed, second, collate)
        expected = found["second"] = logits(model, batches)
        adapter, whole = folder / "adapter", replace(args, load_in_4bit=False)
        stock = PeftModel.from_pretrained(models.causal(args), adapter)
        if args.load_in_4bit:  # merging 4-bit weights would round them anew: W + sBA of the unquantized ones is saved
            model = PeftModel.from_pretrained(models.causal(whole), adapter)
        model.merge_and_unload().save_pretrained(folder / "merged")
        tokenizer.save_pretrained(folder / "merged")
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged", **models.loading(whole)).to(models.device())
        copies = {name: logits(copy, batches) for name, copy in {"peft": stock, "merged": merged}.items()}
        print(serving(folder / "merged", adapter, models.source(args.model)))
        return {
            **{f"nll_{name}": nll(some, batches) for name, some in found.items()},
            **{f"{name}_differs_by": difference(some, expected, batches) for name, some in copies.items()},
            **trained,
        }

    return run_all(args, run, arguments)


if __name__ == "__main__":
    main()
