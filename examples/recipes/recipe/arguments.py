"""The arguments that all recipes have, and the settings of the papers that `--paper` puts in their place.

The order is: what is given on the command line, the paper's settings for the task if `--paper` is given, the small
defaults of the recipe.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from transformers import HfArgumentParser

from .methods import METHODS


@dataclass
class RecipeArguments:
    """Arguments of every recipe. A recipe subclasses it, and gives the defaults that run in minutes on two cores."""

    method: list[str] = field(
        default_factory=lambda: ["lora", "flat"],
        metadata={"help": f"one or more of {', '.join(METHODS)}; differences are to the first"},
    )
    rho: float | None = field(default=None, metadata={"help": "strength of the perturbation; default: the method's"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "one run of each method per seed"})
    model: str = field(default="", metadata={"help": "a name of a packaged model, a local folder, or a hub name"})
    dataset: str = field(default="", metadata={"help": "a packaged dataset, a local file or folder, or a hub name"})
    output_dir: str = field(default="out", metadata={"help": "where runs, results.csv and report.html go"})
    r: int = field(default=8, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "the update is scaled by lora_alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before A"})
    target_modules: str = field(default="all-linear", metadata={"help": "all-linear, or names separated by commas"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    weight_decay: float = field(default=0.0, metadata={"help": "of AdamW"})
    label_smoothing: float = field(default=0.0, metadata={"help": "of the training loss"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "as in transformers.TrainingArguments"})
    warmup_ratio: float = field(default=0.03, metadata={"help": "share of the steps"})
    warmup_steps: int = field(default=0, metadata={"help": "in place of warmup_ratio, if above 0"})
    batch_size: int = field(default=32, metadata={"help": "examples of an optimizer step, over all processes"})
    micro_batch_size: int | None = field(default=None, metadata={"help": "examples of a forward; default: batch_size"})
    epochs: float = field(default=1.0, metadata={"help": "passes over the training data"})
    max_steps: int = field(default=-1, metadata={"help": "optimizer steps, in place of epochs, if above 0"})
    max_length: int = field(default=128, metadata={"help": "tokens of an example"})
    train_samples: int | None = field(default=None, metadata={"help": "training examples; default: all"})
    eval_samples: int | None = field(default=None, metadata={"help": "test examples of a set; default: all"})
    dtype: Literal["bfloat16", "float32"] = field(
        default="bfloat16", metadata={"help": "of the frozen base model; adapters are float32"}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the base model in bitsandbytes' nf4"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "compute activations twice, keep few"})
    save_steps: int = field(default=500, metadata={"help": "steps between checkpoints, from which a run goes on"})
    paper: bool = field(default=False, metadata={"help": "the paper's settings (see SETTINGS.md); needs a GPU"})
    estimate: bool = field(
        default=False, metadata={"help": "print memory and time on an 80 GB GPU, computed, and end; nothing is run"}
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a method that is unknown, a method or seed that is given twice, or a number out of its bounds.
        """
        if unknown := sorted(set(self.method) - set(METHODS)):
            raise ValueError(f"--method must be of {', '.join(METHODS)}, got {', '.join(unknown)}")
        for name in ("method", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"--{name} must not hold anything twice, got {getattr(self, name)}")
        for name in ("r", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("micro_batch_size", "train_samples", "eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"--micro_batch_size must divide --batch_size {self.batch_size}, got {self.micro_batch_size}"
            )


Arguments = TypeVar("Arguments", bound=RecipeArguments)


def parse(
    kind: type[Arguments], paper: Mapping[str, Mapping[str, Any]], arguments: list[str] | None = None
) -> Arguments:
    """The arguments of the command line.

    Args:
        kind: dataclass of the recipe. If it has a field `task`, that names the entry of `paper`.
        paper: task -> the paper's settings, by field; a recipe with one task has one entry.
        arguments: default: those of the process.

    Raises:
        ValueError: `--paper` with a task that the paper does not have.
    """
    parser = HfArgumentParser(kind)
    given = parser.parse_known_args(arguments)[0]
    if given.paper:
        task = getattr(given, "task", next(iter(paper)))
        if task not in paper:
            raise ValueError(f"--paper must be given with one of --task {', '.join(paper)}, got {task}")
        parser.set_defaults(**paper[task])
    return parser.parse_args_into_dataclasses(arguments)[0]


def command(arguments: list[str] | None) -> str:
    """The command line, to be written beside results."""
    return shlex.join(["python", sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)])


def optimizer_steps(args: RecipeArguments, examples: int) -> int:
    """Of a run on so many training examples; the last step of an epoch may have a smaller batch."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.epochs * math.ceil(examples / args.batch_size))


def settings(args: RecipeArguments) -> dict[str, Any]:
    """What must be the same for runs in one results file: all but the methods, the seeds and where things go."""
    free = {"method", "seeds", "output_dir", "estimate", "save_steps"}
    return {f.name: getattr(args, f.name) for f in fields(args) if f.name not in free}
