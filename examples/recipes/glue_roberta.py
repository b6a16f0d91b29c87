"""GLUE with an encoder and a classification head, whole or few-shot, as in the papers of LoRA and EFMLoRA.

    python examples/recipes/glue_roberta.py                                      # MiniLM, packaged movie reviews
    python examples/recipes/glue_roberta.py --task mrpc --paper --seeds 0 1 2    # RoBERTa-large, as in the paper
    python examples/recipes/glue_roberta.py --task rte --few_shot 512 --paper
    python examples/recipes/glue_roberta.py --dataset mine.jsonl --text_columns question answer --model roberta-base

A file of one's own has the text columns and a column `label`. A tenth of it is held out for the test.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from recipe import files, metrics, models
from recipe.arguments import RecipeArguments, parse
from recipe.estimate import estimate
from recipe.methods import adapt
from recipe.results import run_all
from recipe.training import fit
from transformers import AutoModelForSequenceClassification, RobertaConfig

COLUMNS = {
    **{key: ["sentence"] for key in ["sst2", "cola"]},
    **{key: ["sentence1", "sentence2"] for key in ["mrpc", "rte", "stsb"]},
    "qqp": ["question1", "question2"],
    "qnli": ["question", "sentence"],
    "mnli": ["premise", "hypothesis"],
}
ROWS = {
    **{"mnli": 392_702, "sst2": 67_349, "mrpc": 3_668, "cola": 8_551},
    **{"qnli": 104_743, "qqp": 363_846, "rte": 2_490, "stsb": 5_749},
}  # of the training data, for --estimate
LEARNING_RATES = {
    **{"mnli": 3e-4, "sst2": 4e-4, "mrpc": 3e-4, "cola": 3e-4},
    **{"qnli": 2e-4, "qqp": 3e-4, "rte": 4e-4, "stsb": 3e-4},
}
PAPER = {
    task: {
        "model": "FacebookAI/roberta-large",
        "dataset": f"nyu-mll/glue:{task}",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": "query,value",
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.06,
        "learning_rate": learning_rate,
        "epochs": 10 if task in ("mnli", "sst2", "qnli", "stsb") else 20,
        "max_steps": -1,
        "max_length": 128,
        "batch_size": 8 if task in ("rte", "stsb") else 4,
        "train_samples": None,
        "eval_samples": None,
    }
    for task, learning_rate in LEARNING_RATES.items()
}


@dataclass
class Arguments(RecipeArguments):
    """GLUE with an encoder and a classification head."""

    task: str = field(default="sst2", metadata={"help": f"one of {', '.join(COLUMNS)}, for --paper"})
    few_shot: int | None = field(default=None, metadata={"help": "training examples per class, drawn by the seed"})
    text_columns: list[str] = field(default_factory=list, metadata={"help": "one or two; default: the task's"})
    model: str = "minilm"
    dataset: str = "movie"
    max_length: int = 48
    max_steps: int = 60
    train_samples: int | None = 512
    eval_samples: int | None = 500
    batch_size: int = 16
    learning_rate: float = 1e-3


def load(args: Arguments) -> tuple[list[files.Row], list[files.Row], list[str]]:
    """(training rows, test rows, text columns)."""
    if args.dataset == "movie":
        return *files.movie_reviews(args.train_samples, args.eval_samples), ["text"]
    columns = args.text_columns or COLUMNS[args.task]
    train, test = files.splits(args.dataset, [*columns, "label"], "validation_matched" if args.task == "mnli" else "")
    return train[: args.train_samples], test[: args.eval_samples], columns


def few(rows: list[files.Row], shots: int, seed: int) -> list[files.Row]:
    """So many rows of each class."""
    rng = random.Random(seed)
    by_class = {label: [row for row in rows if row["label"] == label] for label in metrics.labels(rows)}
    if short := [f"{label} has {len(own)}" for label, own in by_class.items() if len(own) < shots]:
        raise ValueError(f"--few_shot must be at most the rows of each class, got {shots} ({', '.join(short)})")
    return [row for own in by_class.values() for row in rng.sample(own, shots)]


def micro_batch(args: Arguments) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """RoBERTa-large and a micro-batch, for the estimate."""
    sizes = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    config = RobertaConfig(vocab_size=50_265, max_position_embeddings=514, **sizes)
    model = AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, args.dtype))
    tokens = torch.ones(args.micro_batch_size or args.batch_size, args.max_length, dtype=torch.long)
    return model, {"input_ids": tokens, "attention_mask": tokens, "labels": tokens[:, 0]}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(Arguments, PAPER, arguments)
    if args.estimate:
        print(estimate(lambda: micro_batch(args), args, ROWS[args.task], task_type="SEQ_CLS"))
        return []
    train, test, columns = load(args)
    regression = args.task == "stsb" and args.paper
    labels = [] if regression else metrics.labels(train)
    tokenizer = models.tokenizer(args.model)

    def collate(rows: list[files.Row]) -> dict[str, torch.Tensor]:
        texts = [[str(row[column]) for row in rows] for column in columns]
        batch = tokenizer(*texts, return_tensors="pt", padding=True, truncation=True, max_length=args.max_length)
        targets = [float(row["label"]) if regression else labels.index(row["label"]) for row in rows]
        return {**batch, "labels": torch.tensor(targets)}

    def run(method: str, seed: int, folder: Path) -> dict[str, float]:
        base = models.encoder(args, max(1, len(labels)), seed)
        model = adapt(base, method, args, seed, task_type="SEQ_CLS")
        drawn = few(train, args.few_shot, seed) if args.few_shot else train
        trained = fit(model, method, args, folder, seed, drawn, collate)
        return {**metrics.classification(model, test, collate, args.task), **trained}

    return run_all(args, run, arguments)


if __name__ == "__main__":
    main()
