"""GLUE and SuperGLUE with T5, text to text, as in the papers of Flat-LoRA (arXiv 2409.14396) and Bi-LoRA (2508.19564).

    python examples/recipes/glue_t5.py                                       # a tiny T5 made here, movie reviews
    python examples/recipes/glue_t5.py --task mrpc --paper --seeds 0 1 2     # T5-base, as Flat-LoRA's authors
    python examples/recipes/glue_t5.py --task cb --paper --method lora flat bilora
    python examples/recipes/glue_t5.py --dataset mine.jsonl --text_columns question answer --model google-t5/t5-base

An example is `task column: text column: text` and the word of its label, as T5 was trained. A file of one's own has the
text columns and a column `label` of words. The answer is the label whose word is the likeliest, log p(word | text) over
its tokens and the end: the labels are known, so no answer is lost for being none of them, as in free generation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from recipe import files, metrics, models
from recipe.arguments import RecipeArguments, parse
from recipe.estimate import estimate
from recipe.methods import adapt
from recipe.results import run_all
from recipe.training import fit
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, T5Config

GLUE, SUPERGLUE = "nyu-mll/glue", "aps/super_glue"
TASKS = {  # dataset, text columns, training rows
    "mnli": (GLUE, ["premise", "hypothesis"], 392_702),
    "sst2": (GLUE, ["sentence"], 67_349),
    "cola": (GLUE, ["sentence"], 8_551),
    "qnli": (GLUE, ["question", "sentence"], 104_743),
    "mrpc": (GLUE, ["sentence1", "sentence2"], 3_668),
    "boolq": (SUPERGLUE, ["question", "passage"], 9_427),
    "cb": (SUPERGLUE, ["premise", "hypothesis"], 250),
    "copa": (SUPERGLUE, ["question", "premise", "choice1", "choice2"], 400),
    "rte": (SUPERGLUE, ["premise", "hypothesis"], 2_490),
    "wic": (SUPERGLUE, ["word", "sentence1", "sentence2"], 5_428),
}
EPOCHS = {"mnli": 1, "sst2": 10, "cola": 10, "qnli": 1, "mrpc": 10}  # Flat-LoRA
BI_EPOCHS = {  # Bi-LoRA
    **{"mnli": 3, "sst2": 3, "cola": 10, "qnli": 3, "mrpc": 10},
    **{"boolq": 10, "cb": 50, "copa": 50, "rte": 10, "wic": 10},
}


def settings(task: str, epochs: int, max_length: int, rho: float) -> dict[str, Any]:
    """The paper's settings of a task; see SETTINGS.md."""
    return {
        **{"model": "google-t5/t5-base", "dataset": f"{TASKS[task][0]}:{task}", "max_length": max_length},
        **{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "rho": rho},
        **{"learning_rate": 5e-4, "weight_decay": 0.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.03},
        **{"batch_size": 32, "epochs": epochs, "max_steps": -1, "train_samples": None, "eval_samples": None},
    }


PAPER = {
    **{task: settings(task, epochs, 128, 0.05) for task, epochs in EPOCHS.items()},
    **{f"bi-{task}": settings(task, BI_EPOCHS[task], 256, 0.05) for task in EPOCHS},
    **{task: settings(task, BI_EPOCHS[task], 256, 0.1) for task in BI_EPOCHS if task not in EPOCHS},
}


@dataclass
class Arguments(RecipeArguments):
    """GLUE and SuperGLUE with T5."""

    task: str = field(default="sst2", metadata={"help": f"for --paper, one of {', '.join(PAPER)}"})
    text_columns: list[str] = field(default_factory=list, metadata={"help": "default: the task's"})
    model: str = "tiny-t5"
    dataset: str = "movie"
    max_length: int = 48
    max_steps: int = 150
    eval_samples: int | None = 1000
    learning_rate: float = 3e-3
    dtype: Literal["bfloat16", "float32"] = "float32"

    @property
    def name(self) -> str:
        """How T5 knows the task."""
        return "sst2" if self.dataset == "movie" else self.task.removeprefix("bi-")

    @property
    def columns(self) -> list[str]:
        return self.text_columns or TASKS[self.name][1]


def load(args: Arguments) -> tuple[list[files.Row], list[files.Row]]:
    """(training rows, test rows)."""
    if args.dataset == "movie":
        return files.movie_reviews(args.train_samples, args.eval_samples, column="sentence")
    test = "validation_matched" if args.name == "mnli" else "validation"
    train, test = files.splits(args.dataset, [*args.columns, "label"], test)
    return train[: args.train_samples], test[: args.eval_samples]


def micro_batch(args: Arguments) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """T5-base and a micro-batch, for the estimate."""
    sizes = dict(
        d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0, use_cache=False
    )
    model = AutoModelForSeq2SeqLM.from_config(T5Config(**sizes), dtype=getattr(torch, args.dtype))
    tokens = torch.ones(args.micro_batch_size or args.batch_size, args.max_length, dtype=torch.long)
    return model, {"input_ids": tokens, "attention_mask": tokens, "labels": tokens[:, :4].contiguous()}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(Arguments, PAPER, arguments)
    if args.estimate:
        print(estimate(lambda: micro_batch(args), args, TASKS[args.name][2], task_type="SEQ_2_SEQ_LM"))
        return []
    train, test = load(args)
    labels, tokenizer = metrics.labels(train), models.tokenizer(args.model)
    metrics.check_labels(labels, test)
    words = tokenizer([str(label) for label in labels], return_tensors="pt", padding=True)
    words = words.input_ids.masked_fill(words.attention_mask == 0, -100)

    def collate(rows: list[files.Row], classes: bool = False) -> dict[str, Tensor]:
        texts = [" ".join([args.name, *(f"{c}: {row[c]}" for c in args.columns)]) for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=args.max_length)
        targets = torch.tensor([labels.index(row["label"]) for row in rows])
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return {**inputs, "labels": targets if classes else words[targets]}

    def run(method: str, seed: int, folder: Path) -> dict[str, float]:
        model = adapt(models.seq2seq(args), method, args, seed, task_type="SEQ_2_SEQ_LM")
        trained = fit(model, method, args, folder, seed, train, collate)
        positive = labels.index("equivalent") if "equivalent" in labels else 1
        scores = metrics.LabelScores(model, words)
        found = metrics.classification(scores, test, lambda rows: collate(rows, classes=True), args.name, positive)
        return {**found, **trained}

    return run_all(args, run, arguments)


if __name__ == "__main__":
    main()
