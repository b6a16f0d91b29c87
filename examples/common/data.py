r"""Labelled sentences and their prompts: text classification as prediction of the next word.

A sentence becomes ``Review: <text>\nSentiment:``, and its label is the word that should follow (" positive").
The packaged data are 23.7k sentences from four domains, each rated by a crowd of people, published with C.J. Hutto and
E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014. The movie
reviews among them go back to Pang and Lee (2004), the Amazon reviews to Hu and Liu (2004).
"""

from __future__ import annotations

import csv
import html
import io
import json
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.packages import Package, fetch

VADER = Package(
    requirement="vadersentiment==3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    about="23.7k sentences rated by people, MIT, 2.5 MB",
)
VADER_FILES = {
    "movie": "movieReviewSnippets",
    "Amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "NYT": "nytEditorialSnippets",
}
CLEAR = 0.5  # |mean rating|, on a scale from -4 to 4, from which a sentence counts as positive or negative
HELD_OUT = 0.2  # share of the in-domain data that is never trained on
SPLIT_SEED = 0  # the split is the same for every seed of training


@dataclass(frozen=True)
class Example:
    """One text and the index of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class Task:
    """What to train on and what to test on."""

    labels: tuple[str, ...]
    train: list[Example]
    tests: dict[str, list[Example]]  # by domain; the first is the one trained on


def load_task(
    dataset: str,
    other_domains: Sequence[str] = (),
    text_column: str = "text",
    label_column: str = "label",
) -> Task:
    """The packaged `movie` task, a local .csv or .jsonl file, or a dataset on the Hugging Face hub."""
    if dataset == "movie":
        return _movie_task()
    if Path(dataset).suffix in (".csv", ".jsonl"):
        rows = read_rows(Path(dataset), text_column, label_column)
        train, test = split(rows)
    else:
        train, test = _hub_rows(dataset, text_column, label_column)
    others = {Path(name).stem: read_rows(Path(name), text_column, label_column) for name in other_domains}
    labels = tuple(sorted({label for _, label in train}))
    named = {"held-out": test, **others}
    return Task(labels, _examples(train, labels), {name: _examples(rows, labels) for name, rows in named.items()})


def split(rows: Sequence) -> tuple[list, list]:
    """(training rows, held-out rows), shuffled; always the same split of the same rows."""
    rows = random.Random(SPLIT_SEED).sample(rows, len(rows))
    held_out = round(HELD_OUT * len(rows))
    return rows[held_out:], rows[:held_out]


def _examples(rows: Iterable[tuple[str, str]], labels: tuple[str, ...]) -> list[Example]:
    rows = list(rows)
    if unknown := {label for _, label in rows} - set(labels):
        raise ValueError(f"every label must be one of the training data's {labels}, got {sorted(unknown)}")
    return [Example(text, labels.index(label)) for text, label in rows]


# --- the packaged data


def _movie_task() -> Task:
    domains = read_vader(fetch(VADER))
    train, test = split(domains.pop("movie"))
    others = {name: split(examples)[1] for name, examples in domains.items()}
    return Task(("negative", "positive"), train, {"movie": test, **others})


def read_vader(archive: Path) -> dict[str, list[Example]]:
    """The clearly positive (1) and clearly negative (0) sentences of each domain in the package's source archive."""
    contents = _vader_files(archive)
    return {name: parse_vader(contents[name]) for name in VADER_FILES}


def read_editorials(archive: Path) -> list[list[str]]:
    """The editorials of the NYT as lists of their sentences, in order, whatever their ratings."""
    articles: dict[str, list[str]] = {}
    for line in _vader_files(archive)["NYT"].decode("utf-8").splitlines():
        number, _, text = line.split("\t")  # 97_2 is the second sentence of editorial 97
        articles.setdefault(number.partition("_")[0], []).append(html.unescape(text).strip())
    return list(articles.values())


def _vader_files(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as outer:
        inner = _member(outer, "hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as files:
        return {name: _member(files, f"{file}_GroundTruth.txt") for name, file in VADER_FILES.items()}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    found = [member for member in archive.getmembers() if member.name.endswith(f"/{name}")]
    if len(found) != 1:
        raise ValueError(f"the archive must hold one file {name}, found {len(found)}")
    file = archive.extractfile(found[0])
    assert file is not None
    return file.read()


def parse_vader(content: bytes) -> list[Example]:
    """Lines of `id <tab> mean rating <tab> text`; each text once, and only where people clearly took a side."""
    examples = {}
    for line in content.decode("utf-8").splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= CLEAR:
            text = html.unescape(text).strip()
            examples.setdefault(text, Example(text, int(float(rating) > 0)))
    return list(examples.values())


# --- other data


def read_rows(path: Path, text_column: str, label_column: str) -> list[tuple[str, str]]:
    """(text, label) rows of a .csv file with a header, or of a .jsonl file with one object per line."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
    if not rows:
        raise ValueError(f"{path} must hold at least one row, got none")
    for column in (text_column, label_column):
        if column not in rows[0]:
            raise ValueError(f"{path} must have a column {column!r}, got {', '.join(rows[0])}")
    return [(row[text_column], str(row[label_column])) for row in rows]


def _hub_rows(dataset: str, text_column: str, label_column: str) -> tuple[list, list]:
    """Training and held-out rows of a dataset on the hub, `name` or `name:configuration`."""
    from datasets import load_dataset

    name, _, configuration = dataset.partition(":")
    splits = load_dataset(name, configuration or None)

    def rows(part: str) -> list[tuple[str, str]]:
        feature = splits[part].features[label_column]
        names = getattr(feature, "names", None)
        pairs = zip(splits[part][text_column], splits[part][label_column], strict=True)
        return [(text, names[label] if names else str(label)) for text, label in pairs if label not in (None, -1)]

    tests = [part for part in ("validation", "test") if part in splits]
    return (rows("train"), rows(tests[0])) if tests else split(rows("train"))


def endless_batches(examples: Sequence[Example], batch_size: int, seed: int, pool: int = 8) -> Iterator[list[Example]]:
    """Whole batches, epoch after epoch, shuffled anew; texts of a batch have similar lengths, so little is padding.

    Args:
        pool: batches that are sorted by length together, then shuffled.
    """
    rng = random.Random(seed)
    while True:
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order), pool * batch_size):
            near = sorted(order[start : start + pool * batch_size], key=lambda example: len(example.text))
            batches = [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
            rng.shuffle(batches)
            yield from (batch for batch in batches if len(batch) == batch_size)


# --- prompts


class Encoder:
    """Examples to tensors: left-padded prompts, and the token that should follow each.

    Args:
        tokenizer: that pads on the left.
        prompt: holds ``{text}`` and ends where the label's word should follow.
        labels: words; their first tokens after the prompt must differ.
        max_tokens: prompts are cut to this many, on the left.

    Raises:
        ValueError: no ``{text}`` in the prompt, or labels that start with the same token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, labels: Sequence[str], max_tokens: int = 128
    ) -> None:
        if "{text}" not in prompt:
            raise ValueError(f"prompt must hold {{text}}, got {prompt!r}")
        self.tokenizer, self.prompt, self.labels, self.max_tokens = tokenizer, prompt, tuple(labels), max_tokens
        self.answer_ids = torch.tensor([self._answer_id(label) for label in labels])  # (labels,)
        if len(set(self.answer_ids.tolist())) < len(labels):
            raise ValueError(f"labels must start with different tokens after the prompt, got {tuple(labels)}")

    def _answer_id(self, label: str) -> int:
        before = self.tokenizer(self.prompt).input_ids
        after = self.tokenizer(f"{self.prompt} {label}").input_ids
        if after[: len(before)] != before or len(after) == len(before):
            raise ValueError(f"prompt must end where a new token starts (no space, say), got {self.prompt!r}")
        return after[len(before)]

    def __call__(
        self, examples: Sequence[Example], device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs of the model, each (examples, tokens); the token to predict, (examples,))."""
        prompts = [self.prompt.replace("{text}", example.text) for example in examples]
        encoded = self.tokenizer(
            prompts, return_tensors="pt", padding=True, truncation=True, max_length=self.max_tokens
        )
        mask = encoded["attention_mask"].to(device)
        inputs = {
            "input_ids": encoded["input_ids"].to(device),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),  # a left-padded text still starts at position 0
        }
        return inputs, self.answer_ids[[example.label for example in examples]].to(device)
