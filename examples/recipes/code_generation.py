"""Python functions from their docstrings: pass@1, as in the paper of Flat-LoRA (CodeFeedback, then HumanEval).

    python examples/recipes/code_generation.py --execute                 # SmolLM2, functions of our own, HumanEval
    python examples/recipes/code_generation.py --execute --paper         # Llama-2-7B on CodeFeedback
    python examples/recipes/code_generation.py --dataset mine.jsonl --instruct

The problems of HumanEval come from its package. Generated code runs with `--execute` only, isolated as
`recipe/sandbox.py` says; without it the answers are written to answers.jsonl, and nothing is judged. A file of one's
own has the columns `query` and `answer`, and the problems of `--problems` have `prompt`, `entry_point` and `test`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from recipe import files, functions, generation, models, programs, sandbox
from recipe.arguments import RecipeArguments, parse
from recipe.estimate import estimate
from recipe.methods import adapt
from recipe.programs import Problem
from recipe.results import run_all
from recipe.training import fit

HELD_OUT = 40  # of the 210 functions
PAPER = {
    "humaneval": {
        **generation.LLAMA_2_7B,
        "dataset": "m-a-p/CodeFeedback-Filtered-Instruction",
        "problems": "humaneval",
        "instruct": True,
        "train_samples": 100_000,
        "samples": 5,
        "temperature": 0.8,
        "top_p": 0.95,
        "max_new_tokens": 512,
    }
}


@dataclass
class Arguments(RecipeArguments):
    """Python functions from their docstrings."""

    model: str = "smollm2"
    dataset: str = "functions"
    problems: str = field(default="functions,humaneval", metadata={"help": "of the test; or a file"})
    execute: bool = field(default=False, metadata={"help": "run generated code, isolated, and judge it"})
    accept_risk: bool = field(default=False, metadata={"help": "run it also where it is not isolated; see the message"})
    seconds: float = field(default=10.0, metadata={"help": "a program may take"})
    instruct: bool = field(default=False, metadata={"help": "ask in Alpaca's form, and take the first code block"})
    samples: int = field(default=2, metadata={"help": "answers to each problem"})
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 48
    max_steps: int = 12
    eval_samples: int | None = field(default=12, metadata={"help": "problems of each kind"})
    batch_size: int = 8
    learning_rate: float = 1e-3


def pairs(args: Arguments) -> list[generation.Pair]:
    """(prompt, answer) of the training data. Answers end with their first code block, if they have one."""
    if args.dataset == "functions":
        known = functions.all_functions()[HELD_OUT:]
        rows = [{"query": question(p, args), "answer": p.solution if not args.instruct else solved(p)} for p in known]
    else:
        rows = files.load_rows(args.dataset, ["query", "answer"])
    found = []
    for row in rows:
        query, answer = row["query"], row["answer"]
        if "```" in answer:
            answer = "```".join(answer.split("```")[:2]) + "```"
        elif args.instruct:
            continue
        found.append((generation.ALPACA.format(instruction=query) if args.instruct else query, answer))
    return found


def solved(problem: Problem) -> str:
    return f"```python\n{problem.prompt}{problem.solution}```"


def question(problem: Problem, args: Arguments) -> str:
    """What the model is asked: the head of the function, or an instruction to complete it."""
    return f"Complete the function.\n```python\n{problem.prompt}```" if args.instruct else problem.prompt


def tests(args: Arguments) -> dict[str, list[Problem]]:
    """The problems of the test by their names."""
    found = {}
    for name in args.problems.split(","):
        if name == "functions":
            problems = functions.all_functions()[:HELD_OUT]
        elif name == "humaneval":
            problems = programs.humaneval()
        else:
            problems = [Problem.of(row) for row in files.read_rows(Path(name), programs.COLUMNS)]
        found[Path(name).stem] = problems[: args.eval_samples]
    return found


def sample(model: Any, tokenizer: Any, problems: Sequence[Problem], args: Arguments) -> list[str]:
    """`samples` answers to each problem, those to one problem beside one another."""
    asked = [question(problem, args) for problem in problems for _ in range(args.samples)]
    prompts = [generation.ALPACA.format(instruction=text) if args.instruct else text for text in asked]
    drawn = dict(do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=0)
    return generation.answers(model, tokenizer, prompts, args.max_new_tokens, **drawn)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(Arguments, PAPER, arguments)
    if args.estimate:
        rows = args.train_samples or len(functions.all_functions()) - HELD_OUT
        print(estimate(lambda: generation.llama_micro_batch(args, "llama-2-7b"), args, rows, task_type="CAUSAL_LM"))
        return []
    limits = sandbox.Limits(seconds=args.seconds) if args.execute else None
    if limits:
        sandbox.check_isolation(args.accept_risk)
    problems = tests(args)
    tokenizer = models.tokenizer(args.model)
    train = generation.encode_short(tokenizer, pairs(args), args.max_length, args.train_samples)

    def run(method: str, seed: int, folder: Path) -> dict[str, float]:
        model = adapt(models.causal(args), method, args, seed, task_type="CAUSAL_LM")
        trained = fit(model, method, args, folder, seed, train, generation.collator(tokenizer))
        torch.manual_seed(seed)
        found: dict[str, float] = {}
        for name, asked in problems.items():
            answers = sample(model, tokenizer, asked, args)
            scores = programs.judge(asked, answers, folder / f"answers-{name}.jsonl", limits)
            found |= {f"{score}_{name}": value for score, value in scores.items()}
        return {**found, **trained}

    return run_all(args, run, arguments)


if __name__ == "__main__":
    main()
