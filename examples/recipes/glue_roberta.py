"""GLUE with an encoder and a classification head, whole or few-shot, as in the papers of LoRA and EFMLoRA.

    python examples/recipes/glue_roberta.py                                      # MiniLM, packaged movie reviews
    python examples/recipes/glue_roberta.py --task mrpc --paper --seeds 0 1 2    # RoBERTa-large, as in the paper
    python examples/recipes/glue_roberta.py --task few-trec --paper              # 512 examples per class, 3 seeds
    python examples/recipes/glue_roberta.py --dataset mine.jsonl --text_columns question answer --model roberta-base

A file of one's own has the text columns and a column `label`. A tenth of it is held out for the test. GLUE's own test
sets have no labels: as in the papers, the test is its validation set (of MNLI, the mismatched one, as EFMLoRA's).
"""

from __future__ import annotations

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

GLUE = "nyu-mll/glue"
TASKS = {  # dataset, text columns, column of the label, split for the test, training rows
    "mnli": (f"{GLUE}:mnli", ["premise", "hypothesis"], "label", "validation_mismatched", 392_702),
    "sst2": (f"{GLUE}:sst2", ["sentence"], "label", "validation", 67_349),
    "mrpc": (f"{GLUE}:mrpc", ["sentence1", "sentence2"], "label", "validation", 3_668),
    "cola": (f"{GLUE}:cola", ["sentence"], "label", "validation", 8_551),
    "qnli": (f"{GLUE}:qnli", ["question", "sentence"], "label", "validation", 104_743),
    "qqp": (f"{GLUE}:qqp", ["question1", "question2"], "label", "validation", 363_846),
    "rte": (f"{GLUE}:rte", ["sentence1", "sentence2"], "label", "validation", 2_490),
    "stsb": (f"{GLUE}:stsb", ["sentence1", "sentence2"], "label", "validation", 5_749),
    "sst5": ("SetFit/sst5", ["text"], "label_text", "test", 8_544),
    "snli": ("stanfordnlp/snli", ["premise", "hypothesis"], "label", "test", 549_367),
    "trec": ("SetFit/TREC-QC", ["text"], "label_coarse", "test", 5_452),
}
SETTINGS = {  # learning rate, epochs, batch of each of 8 GPUs, tokens
    **{"mnli": (3e-4, 10, 4, 128), "sst2": (4e-4, 10, 8, 512), "mrpc": (3e-4, 20, 4, 512), "cola": (3e-4, 20, 4, 128)},
    **{"qnli": (2e-4, 10, 4, 512), "qqp": (3e-4, 20, 4, 512), "rte": (4e-4, 20, 8, 512), "stsb": (3e-4, 10, 4, 128)},
}
FEW_SHOT = {  # the task of GLUE whose rates are taken, classes
    **{"sst2": ("sst2", 2), "sst5": ("sst2", 5), "snli": ("mnli", 3)},
    **{"mnli": ("mnli", 3), "rte": ("rte", 2), "trec": ("sst2", 6)},
}


def settings(task: str, like: str) -> dict[str, Any]:
    """The paper's settings of a task, with the rates of one of GLUE; see SETTINGS.md."""
    learning_rate, epochs, batch, tokens = SETTINGS[like]
    return {
        **{"model": "FacebookAI/roberta-large", "dataset": TASKS[task][0], "max_length": tokens},
        **{"r": 8, "lora_alpha": 16, "target_modules": "query,value"},
        **{"learning_rate": learning_rate, "weight_decay": 0.1, "lr_scheduler_type": "linear", "warmup_ratio": 0.06},
        **{"batch_size": 8 * batch, "micro_batch_size": batch, "epochs": epochs, "max_steps": -1},
        **{"train_samples": None, "eval_samples": None},
    }


SHOTS = {"few_shot": 512, "seeds": [0, 1, 2], "eval_samples": 1000}
PAPER = {
    **{task: settings(task, task) for task in SETTINGS},
    **{f"few-{x}": {**settings(x, like), **SHOTS} for x, (like, _) in FEW_SHOT.items()},
}


@dataclass
class Arguments(RecipeArguments):
    """GLUE with an encoder and a classification head."""

    task: str = field(default="sst2", metadata={"help": f"for --paper, one of {', '.join(PAPER)}"})
    few_shot: int | None = field(default=None, metadata={"help": "training examples per class, drawn by the seed"})
    text_columns: list[str] = field(default_factory=list, metadata={"help": "default: the task's"})
    model: str = "minilm"
    dataset: str = "movie"
    max_length: int = 48
    max_steps: int = 60
    train_samples: int | None = 512
    eval_samples: int | None = 500
    batch_size: int = 16
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.text_columns) > 2:
            raise ValueError(f"--text_columns must be one or two, got {self.text_columns}")

    @property
    def name(self) -> str:
        return self.task.removeprefix("few-")


def load(args: Arguments) -> tuple[list[files.Row], list[files.Row], list[str]]:
    """(training rows, test rows, text columns)."""
    if args.dataset == "movie":
        return *files.movie_reviews(args.train_samples, args.eval_samples), ["text"]
    name, columns, label, test_split, _ = TASKS[args.name]
    columns, label = args.text_columns or columns, label if args.dataset == name else "label"
    parts = files.splits(args.dataset, [*columns, label], test_split)
    train, test = ([{**row, "label": row[label]} for row in part] for part in parts)
    return train[: args.train_samples], test[: args.eval_samples], columns


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
        rows = args.few_shot * FEW_SHOT[args.name][1] if args.few_shot else TASKS[args.name][-1]
        print(estimate(lambda: micro_batch(args), args, rows, task_type="SEQ_CLS"))
        return []
    train, test, columns = load(args)
    regression = args.task == "stsb" and args.dataset != "movie"
    labels = [] if regression else metrics.labels(train)
    metrics.check_labels(labels, [] if regression else test)
    tokenizer = models.tokenizer(args.model)

    def collate(rows: list[files.Row]) -> dict[str, torch.Tensor]:
        texts = [[str(row[column]) for row in rows] for column in columns]
        batch = tokenizer(*texts, return_tensors="pt", padding=True, truncation=True, max_length=args.max_length)
        targets = [float(row["label"]) if regression else labels.index(row["label"]) for row in rows]
        return {**batch, "labels": torch.tensor(targets)}

    def run(method: str, seed: int, folder: Path) -> dict[str, float]:
        base = models.encoder(args, max(1, len(labels)), seed)
        base.config.pad_token_id = tokenizer.pad_token_id  # a decoder looks for the last token before it
        model = adapt(base, method, args, seed, task_type="SEQ_CLS")
        drawn = files.few(train, args.few_shot, seed) if args.few_shot else train
        trained = fit(model, method, args, folder, seed, drawn, collate)
        positive = next((k for k, label in enumerate(labels) if label in ("equivalent", "duplicate")), 1)
        return {**metrics.classification(model, test, collate, args.task, positive), **trained}

    return run_all(args, run, arguments)


if __name__ == "__main__":
    main()
