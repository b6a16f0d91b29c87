"""Sentences from meaning representations: GPT-2 on the E2E challenge, as in the papers of LoRA and EFMLoRA.

    python examples/recipes/data_to_text.py                       # a tiny GPT-2, meanings and sentences of our own
    python examples/recipes/data_to_text.py --paper               # GPT-2 medium on E2E
    python examples/recipes/data_to_text.py --dataset mine.csv --model gpt2 --target_modules c_attn

BLEU is sacrebleu's and ROUGE-L rouge-score's (`pip install sacrebleu rouge-score`); without them there are neither. A
file of one's own has the columns `meaning_representation` and `human_reference`, a row per reference; a tenth of the
meanings is held out for the test.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from recipe import files, generation, meanings, models
from recipe.arguments import RecipeArguments, parse
from recipe.estimate import estimate
from recipe.methods import adapt
from recipe.results import run_all
from recipe.training import fit
from transformers import AutoModelForCausalLM, GPT2Config

MEANING, REFERENCE = "meaning_representation", "human_reference"
PAPER = {
    "e2e": {
        "model": "openai-community/gpt2-medium",
        "dataset": "tuetschek/e2e_nlg",
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": "c_attn",
        "learning_rate": 2e-4,
        "weight_decay": 0.01,
        "label_smoothing": 0.1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 500,
        "batch_size": 8,
        "epochs": 5,
        "max_length": 512,
        **{"max_steps": -1, "train_samples": None, "eval_samples": None},
        **{"beams": 10, "length_penalty": 0.9, "no_repeat_ngram": 4, "max_new_tokens": 64},
    }
}


@dataclass
class Arguments(RecipeArguments):
    """Sentences from meaning representations."""

    model: str = field(default="tiny", metadata={"help": "tiny (trained here once), a local folder, or a hub name"})
    dataset: str = "meanings"
    target_modules: str = "c_attn,c_proj,c_fc"
    beams: int = field(default=4, metadata={"help": "of the search for the likeliest text"})
    length_penalty: float = field(default=1.0, metadata={"help": "as in transformers.GenerationConfig"})
    no_repeat_ngram: int = field(default=0, metadata={"help": "tokens of a sequence that a text has once; 0: any"})
    max_new_tokens: int = 48
    max_steps: int = 150
    batch_size: int = 16
    learning_rate: float = 3e-3
    dtype: Literal["bfloat16", "float32"] = "float32"


def load(args: Arguments) -> tuple[list[files.Row], dict[str, list[str]]]:
    """(training rows, the references of each meaning of the test)."""
    columns = [MEANING, REFERENCE]
    if args.dataset == "meanings":
        train, test = meanings.own_data()
    elif Path(args.dataset).suffix in (".csv", ".jsonl"):
        train, test = by_meaning(files.read_rows(Path(args.dataset), columns))
    else:
        train, test = (files.load_rows(args.dataset, columns, split) for split in ("train", "test"))
    references: dict[str, list[str]] = {}
    for row in test:
        references.setdefault(row[MEANING], []).append(row[REFERENCE])
    return train, dict(list(references.items())[: args.eval_samples])


def by_meaning(rows: Sequence[files.Row]) -> tuple[list[files.Row], list[files.Row]]:
    """(training rows, test rows): every tenth meaning with all its references is in the test."""
    known = list(dict.fromkeys(row[MEANING] for row in rows))
    if len(known) < 2:
        raise ValueError(f"the file must hold at least two meanings, one of which is held out, got {len(known)}")
    held = set(known[::10])
    return [r for r in rows if r[MEANING] not in held], [r for r in rows if r[MEANING] in held]


def scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU and ROUGE-L, in percent, of texts that have several references each; what is not installed is left out."""
    found = {}
    if importlib.util.find_spec("sacrebleu"):
        import sacrebleu

        most = max(map(len, references))
        columns = [[own[k] if k < len(own) else None for own in references] for k in range(most)]
        found["bleu"] = sacrebleu.corpus_bleu(list(texts), columns).score
    if importlib.util.find_spec("rouge_score"):
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        each = [scorer.score_multi(own, text)["rougeL"].fmeasure for own, text in zip(references, texts, strict=True)]
        found["rougeL"] = 100 * sum(each) / len(each)
    return found


def micro_batch(args: Arguments) -> tuple[torch.nn.Module, dict[str, Any]]:
    """GPT-2 medium and a micro-batch, for the estimate."""
    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    tokens = torch.ones(args.micro_batch_size or args.batch_size, args.max_length, dtype=torch.long)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    return model, {"input_ids": tokens, "attention_mask": tokens, "labels": tokens, "use_cache": False}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(Arguments, PAPER, arguments)
    conv1d = dict(task_type="CAUSAL_LM", fan_in_fan_out=True)  # GPT-2's Conv1D stores (in, out)
    if args.estimate:
        print(estimate(lambda: micro_batch(args), args, args.train_samples or 42_061, **conv1d))
        return []
    if args.model == "tiny":
        args.model = str(meanings.tiny_gpt2())
    train, test = load(args)
    tokenizer = models.tokenizer(args.model)
    pairs = [(meanings.PROMPT.format(meaning=row[MEANING]), " " + row[REFERENCE]) for row in train]
    encoded = generation.encode_short(tokenizer, pairs, args.max_length, args.train_samples)
    prompts = [meanings.PROMPT.format(meaning=meaning) for meaning in test]
    search = dict(num_beams=args.beams, length_penalty=args.length_penalty, no_repeat_ngram_size=args.no_repeat_ngram)

    def run(method: str, seed: int, folder: Path) -> dict[str, float]:
        model = adapt(models.causal(args), method, args, seed, **conv1d)
        trained = fit(model, method, args, folder, seed, encoded, generation.collator(tokenizer))
        texts = [t.strip() for t in generation.answers(model, tokenizer, prompts, args.max_new_tokens, **search)]
        rows = [{"meaning": m, "text": t, "references": own} for (m, own), t in zip(test.items(), texts, strict=True)]
        files.write_jsonl(folder / "texts.jsonl", rows)
        said = [meanings.slots(meaning, text) for meaning, text in zip(test, texts, strict=True)]
        return {**scores(texts, list(test.values())), "slots": sum(said) / len(said), **trained}

    return run_all(args, run, arguments)


if __name__ == "__main__":
    main()
