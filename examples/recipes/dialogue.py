"""Answers to instructions, by TRL's SFTTrainer and, with --dpo, its DPOTrainer.

    python examples/recipes/dialogue.py --dpo                         # SmolLM2, instructions of our own
    python examples/recipes/dialogue.py --task mt_bench --paper       # Flat-LoRA's: Llama-2-7B on WizardLM
    python examples/recipes/dialogue.py --task instruct_eval --paper  # Bi-LoRA's: Llama-3.1-8B on Cleaned Alpaca
    python examples/recipes/dialogue.py --dataset mine.jsonl --questions questions.jsonl

Instructions of our own are judged by rules. Questions of another kind are answered only: METHOD-seedN/judge has the
files that FastChat's llm_judge reads (question.jsonl and model_answer/), for a judge of one's choice. A file of one's
own has the columns `instruction` and `output`, and `input` where there is one; with --dpo also `rejected`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recipe import chat, files, generation, models
from recipe.arguments import RecipeArguments, parse
from recipe.estimate import estimate
from recipe.instructions import Instruction, all_instructions
from recipe.methods import adapt
from recipe.results import run_all

HELD_OUT = 60  # of the 360 instructions
REFUSALS = ("sorry", "as an ai")
SIZES = {"mt_bench": "llama-2-7b", "instruct_eval": "llama-3.1-8b"}
PAPER = {
    "mt_bench": {
        **generation.LLAMA_2_7B,
        "dataset": "silk-road/Wizard-LM-Chinese-instruct-evol",
        "questions": "HuggingFaceH4/mt_bench_prompts",
        "template": "alpaca",
        "train_samples": 52_000,
        "max_new_tokens": 1024,
    },
    "instruct_eval": {
        **generation.LLAMA_2_7B,
        "model": "meta-llama/Llama-3.1-8B",
        "dataset": "yahma/alpaca-cleaned",
        "questions": "",
        "template": "alpaca",
        "learning_rate": 3e-4,
        "batch_size": 128,
        "micro_batch_size": 4,
        "epochs": 3,
        "max_length": 256,
        "train_samples": None,
        "max_new_tokens": 512,
    },
}


@dataclass
class Arguments(RecipeArguments):
    """Answers to instructions."""

    task: Literal["mt_bench", "instruct_eval"] = field(default="mt_bench", metadata={"help": "for --paper"})
    model: str = "smollm2"
    dataset: str = "instructions"
    questions: str = field(default="", metadata={"help": "`question.jsonl` of llm_judge, or a hub name; for a judge"})
    template: Literal["chat", "alpaca"] = field(default="chat", metadata={"help": "the tokenizer's own, or Alpaca's"})
    dpo: bool = field(default=False, metadata={"help": "train on preferences after SFT"})
    dpo_steps: int = 8
    dpo_learning_rate: float = 1e-4
    beta: float = field(default=0.1, metadata={"help": "of DPO"})
    max_new_tokens: int = 32
    max_steps: int = 12
    eval_samples: int | None = 40
    batch_size: int = 8
    learning_rate: float = 1e-3


def own_rows() -> list[files.Row]:
    """Instructions with good and bad answers."""
    rng = random.Random(0)
    known = all_instructions()[HELD_OUT:]
    return [{"prompt": i.text, "completion": i.answer(rng), "rejected": i.bad_answer(rng)} for i in known]


def rows_of(args: Arguments) -> list[files.Row]:
    """Rows with `prompt`, `completion` and, for DPO, `rejected`. Refusals are dropped, as in the paper."""
    columns = ["instruction", "output", *(["rejected"] if args.dpo else [])]
    found = []
    for row in files.load_rows(args.dataset, columns):
        text = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        if args.task == "instruct_eval" or not any(word in row["output"].lower() for word in REFUSALS):
            found.append({"prompt": text, "completion": row["output"], "rejected": row.get("rejected", "")})
    return found


def short(rows: Sequence[files.Row], tokenizer: Any, args: Arguments) -> list[files.Row]:
    """The first `train_samples` rows of at most `max_length` tokens."""
    kept: list[files.Row] = []
    for row in rows:
        text = chat.prompt(chat.user(row["prompt"]), tokenizer, args.template) + row["completion"]
        if len(tokenizer(text).input_ids) < args.max_length:
            kept.append(row)
        if len(kept) == args.train_samples:
            break
    if not kept:
        raise ValueError(f"--max_length must leave at least one example, got {args.max_length} and longer ones only")
    return kept


def tests(args: Arguments) -> tuple[list[Instruction], list[files.Row]]:
    """(instructions that rules judge, questions for a judge)."""
    ruled = all_instructions()[:HELD_OUT][: args.eval_samples] if args.dataset == "instructions" else []
    if args.questions:
        columns = ["turns"] if Path(args.questions).suffix == ".jsonl" else ["prompt"]
        return ruled, [chat.as_question(row, k) for k, row in enumerate(files.load_rows(args.questions, columns))]
    return ruled, [{"question_id": k, "category": i.form, "turns": [i.text]} for k, i in enumerate(ruled)]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(Arguments, PAPER, arguments)
    if args.estimate:
        size, rows = SIZES[args.task], args.train_samples or 51_760
        print(estimate(lambda: generation.llama_micro_batch(args, size), args, rows, task_type="CAUSAL_LM"))
        return []
    tokenizer = models.tokenizer(args.model)
    train = short(own_rows() if args.dataset == "instructions" else rows_of(args), tokenizer, args)
    ruled, questions = tests(args)

    def run(method: str, seed: int, folder: Path) -> dict[str, float]:
        model = adapt(models.causal(args), method, args, seed, task_type="CAUSAL_LM")
        trained = chat.sft(model, method, args, folder, seed, tokenizer, train, args.template)
        if args.dpo:
            options = dict(learning_rate=args.dpo_learning_rate, max_steps=args.dpo_steps, beta=args.beta)
            pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["rejected"]} for r in train]
            trained |= chat.dpo(model, method, args, folder / "dpo", seed, tokenizer, pairs, args.template, **options)
        found: dict[str, float] = {}
        turns = [row["turns"] for row in questions]
        answered = chat.converse(model, tokenizer, turns, args.template, args.max_new_tokens)
        chat.write_for_judge(folder / "judge", questions, answered, f"{method}-seed{seed}")
        if ruled and not args.questions:
            for name in ("follows", "knows"):
                scores = [getattr(i, name)(texts[0]) for i, texts in zip(ruled, answered, strict=True)]
                found[name] = sum(scores) / len(scores)
        return {**found, **trained}

    return run_all(args, run, arguments)


if __name__ == "__main__":
    main()
