"""The tasks of the study: a pretrained model, data to train on, and tests that tuning never sees.

`load` gives the two apart: a task knows its training pool and its validation data, and has no way to its tests.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from common import data, models
from common.data import Example
from study import outcomes
from study.arms import ARMS, CORE
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

Tests = dict[str, list]  # by domain; the first is the one trained on


@dataclass(frozen=True)
class Cell:
    """One training condition of a task."""

    name: str
    samples: int
    flipped: float  # share of the training labels that are wrong
    steps: int
    arms: tuple[str, ...]
    seeds: int


@dataclass
class Task:
    """What a run needs of a task."""

    name: str
    train: list  # the pool that a seed draws from
    validation: list
    stopping: list  # what early stopping looks at during a run: a part of `validation`
    cells: list[Cell]
    domains: list[str]  # names of the tests, for the columns of the CSV
    scores: tuple[str, ...] = outcomes.SCORES
    forgets: tuple[str, ...] = ()  # names of further tests, of plain text: NLL alone, before and after
    batch_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = torch.device("cpu")
    rho: float = 0.1  # at which sharpness is measured
    pairs: int = 4
    eigen_steps: int = 12  # 0: no eigenvalue
    probe: int = 64  # training examples for sharpness

    def base(self, seed: int, dtype: torch.dtype) -> nn.Module:
        """The pretrained model; the seed sets what is new in it."""
        raise NotImplementedError

    @property
    def adapters(self) -> dict[str, Any]:
        """Options of LoraConfig."""
        raise NotImplementedError

    def draw(self, cell: Cell, seed: int) -> list:
        """The training examples of a seed, some with a wrong label."""
        drawn = random.Random(f"draw {seed}").sample(self.train, cell.samples)
        wrong = random.Random(f"flip {seed}").sample(range(cell.samples), round(cell.flipped * cell.samples))
        return [self.flip(x, random.Random(f"{seed} {k}")) if k in set(wrong) else x for k, x in enumerate(drawn)]

    def flip(self, example: Any, rng: random.Random) -> Any:
        """The example with a wrong label."""
        raise NotImplementedError

    def batches(self, examples: Sequence, seed: int) -> Iterator[list]:
        """Training batches without end."""
        raise NotImplementedError

    def encode(self, examples: Sequence) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs of the model, labels)."""
        raise NotImplementedError

    def batch(self, examples: Sequence) -> tuple[dict[str, Tensor], Tensor]:
        """Encoded, on the device of the model."""
        inputs, labels = self.encode(examples)
        return {name: value.to(self.device) for name, value in inputs.items()}, labels.to(self.device)

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """(examples, classes), float32."""
        return model(**inputs).logits.float()

    def loss(self, model: nn.Module, batch: tuple[dict[str, Tensor], Tensor], smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of an encoded batch."""
        inputs, labels = batch
        return F.cross_entropy(self.logits(model, inputs), labels, label_smoothing=smoothing)

    @torch.inference_mode()
    def measure(self, model: nn.Module, examples: Sequence) -> dict[str, float]:
        """The scores of a model in evaluation mode."""
        parts = [self.batch(chunk) for chunk in self.chunks(examples)]
        logits = torch.cat([self.logits(model, inputs) for inputs, _ in parts])
        return outcomes.scores(logits.cpu(), torch.cat([labels for _, labels in parts]).cpu())

    def chunks(self, examples: Sequence, size: int = 64) -> list[list]:
        """Batches for evaluation."""
        return [list(examples[i : i + size]) for i in range(0, len(examples), size)]


def shuffled_batches(examples: Sequence, batch_size: int, seed: int) -> Iterator[list]:
    """Whole batches, epoch after epoch, shuffled anew."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


# --- (a) text


class Float32Linear(nn.Linear):
    """A classification head that stays float32 above a half-precision encoder."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


ALL = tuple(arm.name for arm in ARMS)
TEXT_CELLS = [
    Cell("128-clean", 128, 0.0, 60, ALL, 10),
    Cell("128-flipped", 128, 0.2, 60, ALL, 10),
    Cell("512-clean", 512, 0.0, 120, CORE, 10),
    Cell("512-flipped", 512, 0.2, 120, CORE, 10),
]


@dataclass
class Text(Task):
    """Movie reviews with MiniLM, tested on Amazon reviews, tweets and newspaper editorials too."""

    folder: str = ""  # of the model
    max_tokens: int = 48

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def _encoder(self) -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(
            self.folder, num_labels=2, dtype=torch.float32, attn_implementation="sdpa"
        )

    def base(self, seed: int, dtype: torch.dtype) -> nn.Module:
        model = deepcopy(self._encoder).to(dtype)
        torch.manual_seed(seed)
        model.classifier = Float32Linear(model.config.hidden_size, 2)
        nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
        nn.init.zeros_(model.classifier.bias)
        return model

    @property
    def adapters(self) -> dict[str, Any]:
        return dict(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")

    def flip(self, example: Example, rng: random.Random) -> Example:
        return replace(example, label=1 - example.label)

    def batches(self, examples: Sequence[Example], seed: int) -> Iterator[list[Example]]:
        return data.endless_batches(examples, self.batch_size, seed)

    def encode(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
        texts = [example.text for example in examples]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=self.max_tokens)
        return dict(inputs), torch.tensor([example.label for example in examples])

    def chunks(self, examples: Sequence[Example], size: int = 64) -> list[list[Example]]:
        return super().chunks(sorted(examples, key=lambda example: len(example.text)), size)  # little is padding


def text(validation: int = 800, stopping: int = 200, tests: int = 500) -> tuple[Text, Tests]:
    """Task (a), and its tests."""
    movie = data.load_task("movie")
    pool, held = movie.train[:-validation], movie.train[-validation:]
    folder = str(models.minilm_folder())
    task = Text("text", pool, held, held[:stopping], TEXT_CELLS, list(movie.tests), folder=folder)
    return task, {name: examples[:tests] for name, examples in movie.tests.items()}


def image() -> tuple[Task, Tests]:
    """Task (b), and its tests."""
    from study import images  # which is made of what is above

    return images.image()


def lm() -> tuple[Task, Tests]:
    """Task (c), and its tests."""
    from study import arithmetic

    return arithmetic.lm()


LOADERS = {"text": text, "image": image, "lm": lm}


UNFIT = {"image": ("bilora", "pissa", "pissa-flat", "monteclora")}  # not defined for convolutions, here or in peft
LARGER = {  # the same classes with another model; images in the size of pretraining
    "text": {"folder": "google-bert/bert-large-uncased"},
    "image": {"size": 224},
    "lm": {"folder": "HuggingFaceTB/SmolLM2-1.7B-Instruct"},
}
PAPER_SEEDS = 10


def load(name: str) -> tuple[Task, Tests]:
    """(the task, its tests)."""
    return LOADERS[name]()


def paper(task: Task, device: torch.device) -> Task:
    """The task at the size of a paper: a larger model from the hub, every arm in every cell, on a GPU."""
    cells = paper_cells(task.name, task.cells)
    return replace(task, name=f"{task.name}-paper", cells=cells, device=device, **LARGER[task.name])


def paper_cells(name: str, cells: list[Cell]) -> list[Cell]:
    arms = tuple(arm for arm in ALL if arm not in UNFIT.get(name, ()))
    return [replace(cell, arms=arms, seeds=PAPER_SEEDS) for cell in cells]
