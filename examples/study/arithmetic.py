"""Task (c): sums and differences with SmolLM2-135M-Instruct, and what training on them makes it forget.

A problem is a chain of `+` and `-` over whole numbers ("Calculate: 47 - 8 ="), as in `chain_sum` of reasoning-gym; its
answer is exact. An answer counts if greedy decoding gives it whole, up to the end of the text. One forward pass tells:
that is so if and only if every token of the right answer is the likeliest after those before it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from common import data, models
from common.packages import fetch
from study.arms import CORE
from study.tasks import Cell, Task, Tests, shuffled_batches
from torch import Tensor, nn

TASK = "Calculate:"  # untrained, the model is right in 26 of 40 sums of two digits with it, in 4 without
IGNORED = -100  # target of a position that is no part of the answer
LM_CELLS = [Cell("256-sums", 256, 0.0, 32, CORE, 5)]
TEXT, ARTICLES, SENTENCES = "text", 30, 4  # the test of forgetting: its name, and of what size


@dataclass(frozen=True)
class Passage:
    """What the model reads, and what should follow; an answer has an end, a piece of plain text has none."""

    prompt: str
    answer: str
    ends: bool = True


Digits = tuple[tuple[int, ...], ...]  # of each number, those that its length is drawn from


def problem(rng: random.Random, digits: Digits) -> Passage:
    """A sum or difference of as many numbers as there are lengths."""
    lengths = [rng.choice(choice) for choice in digits]
    numbers = [rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n) for n in lengths]
    signs = [1, *(rng.choice((1, -1)) for _ in numbers[1:])]
    written = [f"{'+' if sign > 0 else '-'} {n}" for sign, n in zip(signs, numbers, strict=True)]
    result = sum(sign * n for sign, n in zip(signs, numbers, strict=True))
    return Passage(f"{TASK} {' '.join(written).removeprefix('+ ')} =", f" {result}")


def problems(count: int, seed: str, digits: Digits) -> list[Passage]:
    """Different problems, in the order in which they were drawn."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        found.setdefault(problem(rng, digits))
    return list(found)


@dataclass
class Arithmetic(Task):
    """Chains of sums with a small language model."""

    scores: tuple[str, ...] = ("acc", "nll")
    forgets: tuple[str, ...] = (TEXT,)
    eigen_steps: int = 0  # a basis of vectors as large as the model does not fit into memory
    folder: str = ""  # of the model

    @cached_property
    def tokenizer(self):
        return models.load_tokenizer(self.folder)

    def base(self, seed: int, dtype: torch.dtype) -> nn.Module:
        return models.load_model(self.folder, dtype, torch.device("cpu"))

    @property
    def adapters(self) -> dict[str, Any]:
        return dict(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")

    def batches(self, examples: Sequence[Passage], seed: int) -> Iterator[list[Passage]]:
        return shuffled_batches(examples, self.batch_size, seed)

    def tokens(self, example: Passage) -> tuple[list[int], list[int]]:
        """(those that are read first, those that should follow)."""
        answer = self.tokenizer(example.answer).input_ids
        return self.tokenizer(example.prompt).input_ids, answer + [self.tokenizer.eos_token_id] * example.ends

    def encode(self, examples: Sequence[Passage]) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs, padded on the left; right tokens at the last positions, (examples, longest answer))."""
        pairs = [self.tokens(example) for example in examples]
        texts = [prompt + answer[:-1] for prompt, answer in pairs]
        longest, kept = max(map(len, texts)), max(len(answer) for _, answer in pairs)
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (longest - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
        targets = torch.tensor([[IGNORED] * (kept - len(answer)) + answer for _, answer in pairs])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # a text starts at position 0
        where = torch.arange(-kept, 0)  # as a tensor: a slice makes torch copy the output layer
        return dict(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=where), targets

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """(examples, longest answer, vocabulary), float32."""
        return model(**inputs, use_cache=False).logits.float()

    def loss(self, model: nn.Module, batch: tuple[dict[str, Tensor], Tensor], smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of the answers' tokens."""
        inputs, targets = batch
        logits = self.logits(model, inputs).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)

    @torch.inference_mode()
    def measure(self, model: nn.Module, examples: Sequence[Passage]) -> dict[str, float]:
        """Share of exact answers, and the mean negative log-likelihood of a whole answer with its end.

        Of plain text: the mean negative log-likelihood of a token; its exponential is the perplexity.
        """
        examples = sorted(examples, key=lambda example: len(example.prompt + example.answer))  # little is padding
        right, nlls, tokens = [], [], []
        for chunk in self.chunks(examples, 32):
            inputs, targets = self.batch(chunk)
            logits, asked = self.logits(model, inputs), targets != IGNORED
            nll = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
            nlls.append(nll.double().sum(1))
            tokens.append(asked.sum(1))
            right.append(((logits.argmax(-1) == targets) | ~asked).all(1))
        nll = torch.cat(nlls)
        if not examples[0].ends:
            return {"nll": (nll.sum() / torch.cat(tokens).sum()).item()}
        return {"acc": torch.cat(right).double().mean().item(), "nll": nll.mean().item()}


def lm(pool: int = 2000, validation: int = 400, stopping: int = 100, tests: int = 200) -> tuple[Arithmetic, Tests]:
    """Task (c), and its tests: sums as in training, of three numbers, of larger ones; beginnings of editorials."""
    alike = problems(pool + validation + tests, "alike", ((1, 2), (1, 2)))
    held, test = alike[pool : pool + validation], alike[pool + validation :]
    longer = problems(tests, "longer", ((1,), (1,), (1,)))
    larger = problems(tests, "larger", ((3,), (1,)))
    domains = {"sums": test, "longer": longer, "larger": larger}
    folder = models.resolve_model("smollm2")
    task = Arithmetic("lm", alike[:pool], held, held[:stopping], LM_CELLS, list(domains), folder=folder)
    editorials = data.read_editorials(fetch(data.VADER))[:ARTICLES]
    texts = [Passage(first, " " + " ".join(rest[: SENTENCES - 1]), ends=False) for first, *rest in editorials]
    return task, {**domains, TEXT: texts}
