"""Questions of mathematics, as in the paper of Flat-LoRA (MetaMathQA, then GSM8K).

    python examples/recipes/mathematics.py                                     # SmolLM2 on the Mathematics Dataset
    python examples/recipes/mathematics.py --modules comparison/sort numbers/gcd
    python examples/recipes/mathematics.py --paper                             # Llama-2-7B, MetaMathQA and GSM8K
    python examples/recipes/mathematics.py --dataset mine.jsonl

The default draws problems from the generators of the Mathematics Dataset, and tests on problems as in training
(interpolate) and on larger ones (extrapolate). A file of one's own has the columns `question` and `answer`; a tenth of
it is held out for the test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe import files, generation, models, school_math
from recipe.arguments import RecipeArguments, parse
from recipe.estimate import estimate
from recipe.final_answer import extract, same
from recipe.methods import adapt
from recipe.results import run_all
from recipe.training import fit

PROMPT = "Q: {question}\nA: "
PAPER = {
    "gsm8k": {
        **generation.LLAMA_2_7B,
        "dataset": "meta-math/MetaMathQA",
        "test": "openai/gsm8k:main",
        "max_length": 512,
        "train_samples": 100_000,
        "max_new_tokens": 512,
    }
}


@dataclass
class Arguments(RecipeArguments):
    """Questions of mathematics."""

    model: str = "smollm2"
    dataset: str = "mathematics-dataset"
    test: str = field(default="", metadata={"help": "a hub name or file of the test, for a dataset without its own"})
    modules: list[str] = field(
        default_factory=lambda: ["numbers/place_value", "comparison/kth_biggest", "comparison/closest"],
        metadata={"help": "generators of the Mathematics Dataset"},
    )
    max_new_tokens: int = 12
    max_steps: int = 16
    train_samples: int | None = 128
    eval_samples: int | None = 48
    batch_size: int = 8
    learning_rate: float = 1e-3


def load(args: Arguments) -> tuple[list[generation.Pair], dict[str, list[generation.Pair]]]:
    """((question, answer) of the training data, those of the tests by their names)."""
    if args.dataset == "mathematics-dataset":
        train = school_math.problems(args.modules, "train", args.train_samples or 10_000, seed=0)
        count, known = args.eval_samples or 1_000, dict(train)
        tests = {kind: school_math.problems(args.modules, kind, count, seed=1) for kind in school_math.KINDS[1:]}
        return train, {kind: [pair for pair in own if pair[0] not in known] for kind, own in tests.items()}
    if args.dataset == "meta-math/MetaMathQA":
        rows = files.load_rows(args.dataset, ["query", "response", "type"])
        train = [(row["query"], reasoning(row["response"])) for row in rows if "GSM" in row["type"]]
        return train, {"gsm8k": pairs(files.load_rows(args.test, ["question", "answer"], "test"))}
    columns = ["question", "answer"]
    if args.test:
        return pairs(files.load_rows(args.dataset, columns)), {
            "test": pairs(files.load_rows(args.test, columns, "test"))
        }
    train_rows, test_rows = files.splits(args.dataset, columns, "test")
    return pairs(train_rows), {"test": pairs(test_rows)}


def pairs(rows: Sequence[files.Row]) -> list[generation.Pair]:
    return [(str(row["question"]), str(row["answer"])) for row in rows]


def reasoning(response: str) -> str:
    """The answer before "The answer is:", as the paper trains on."""
    return response.split("The answer is:")[0].rstrip()


def right_answer(answer: str) -> str:
    """Of a worked answer as GSM8K's, what follows "####"; a short one is itself the answer."""
    return (extract(answer) or answer) if "####" in answer else answer


def score(texts: Sequence[str], asked: Sequence[generation.Pair], file: Path) -> float:
    """The share of right answers; questions and answers go to a file."""
    rows = []
    for text, (question, answer) in zip(texts, asked, strict=True):
        right = right_answer(answer)
        found = extract(text)
        correct = same(found, right) or same(text.strip(), right)  # an answer in words is the whole text
        rows.append({"question": question, "text": text, "found": found, "right": right, "correct": correct})
    files.write_jsonl(file, rows)
    return sum(row["correct"] for row in rows) / len(rows)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(Arguments, PAPER, arguments)
    if args.estimate:
        make = lambda: generation.llama_micro_batch(args, "llama-2-7b")  # noqa: E731
        print(estimate(make, args, args.train_samples or 10_000, task_type="CAUSAL_LM"))
        return []
    train, tests = load(args)
    tokenizer = models.tokenizer(args.model)
    asked = [(PROMPT.format(question=question), answer) for question, answer in train]
    encoded = generation.encode_short(tokenizer, asked, args.max_length, args.train_samples)

    def run(method: str, seed: int, folder: Path) -> dict[str, float]:
        model = adapt(models.causal(args), method, args, seed, task_type="CAUSAL_LM")
        trained = fit(model, method, args, folder, seed, encoded, generation.collator(tokenizer))
        found = {}
        for name, own in tests.items():
            own = own[: args.eval_samples]
            prompts = [PROMPT.format(question=question) for question, _ in own]
            texts = generation.answers(model, tokenizer, prompts, args.max_new_tokens)
            found[f"accuracy_{name}"] = score(texts, own, folder / f"answers-{name}.jsonl")
        return {**found, **trained}

    return run_all(args, run, arguments)


if __name__ == "__main__":
    main()
