"""Final answers in many forms, generators that are imported from an archive, and the recipe on a tiny model."""

import json
import random
import sys
import zipfile
from fractions import Fraction

import mathematics
import numpy as np
import pytest
from helpers import byte_llama
from recipe import school_math
from recipe.final_answer import extract, same, value

FORMS = [
    ("She has 3 + 4 = 7 apples.\n#### 7", "7"),
    ("#### 1,234", "1234"),
    ("#### -5", "-5"),
    ("#### $12.50", "12.50"),
    ("####42", "42"),
    ("#### 20%", "20"),
    ("So 2 times 3 is 6.", "6"),
    ("The answer is: 18", "18"),
    ("The answer is 18.", "18"),
    ("the final answer is: **18**", "18"),
    ("The answer is: \\boxed{18}", "18"),
    ("\\boxed{\\frac{3}{4}} of it", "3/4"),
    ("\\boxed{\\text{north}}", "north"),
    ("\\boxed{1{,}000}", "1000"),
    ("we get $\\boxed{-2}$, not 3", "-2"),
    ("Answer: 3/4", "3/4"),
    ("answer = .5", ".5"),
    ("The answer is: 3 + 4 = 7", "7"),
    ("The answer is: 7 apples and 2 pears", "7"),
    ("The answer is: no", "no"),
    ("First the answer is 3. But no: the answer is 4", "4"),
    ("There were 10-3 left", "3"),
    ("It fell to \u22125 degrees", "-5"),
    ("from 1,000,000 to 2,500,000.75 dollars", "2500000.75"),
    ("about 1e-3", "1e-3"),
    ("16:30, then 5, the end", "5"),
    ("12, 13, 14", "14"),
    ("no number", None),
    ("", None),
    ("#### ", None),
]


@pytest.mark.parametrize("text, answer", FORMS, ids=[text[:25] for text, _ in FORMS])
def test_the_answer_that_is_found_in_a_text(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    "answer, right",
    [("7", "7.0"), ("0.5", "1/2"), ("1,000", "1000"), ("$5", "5"), ("20%", "20"), ("\u22123", "-3"), ("True", "true"),
     ("a", "A"), ("2*x + 1", "2*x+1"), ("yes.", "yes"), ("+4", "4"), ("1e3", "1000"), ("-2/4", "-0.5")],
)  # fmt: skip
def test_the_same_answer_in_another_form(answer, right):
    assert same(answer, right) and same(right, answer)


@pytest.mark.parametrize(
    "answer, right", [("7", "8"), ("0.33", "1/3"), ("x", "y"), (None, "1"), ("1/0", "1"), ("", "0")]
)
def test_another_answer(answer, right):
    assert not same(answer, right)


def test_numbers_are_exact():
    assert value("0.1") == Fraction(1, 10) and value("1/0") is None and value("two") is None


def test_training_ends_before_the_answer_that_is_asked_for():
    assert mathematics.reasoning("So 3.\n#### 3\nThe answer is: 3") == "So 3.\n#### 3"
    assert mathematics.right_answer("So.\n#### 1,200") == "1200" and mathematics.right_answer("a 5") == "a 5"


MODULE = """
import random
import numpy as np
import six
from absl import logging
from six.moves import range
from sympy.solvers.diophantine import base_solution_linear
import collections

Problem = collections.namedtuple("Problem", ("question", "answer"))


def _add(low, high):
    numbers = [random.randint(low, high) for _ in range(2)]
    return Problem("%d + %d %d" % (*numbers, np.random.randint(10**6)), sum(numbers))


def _same():
    return Problem("1 + 1", 2)


def train(entropy_fn):
    assert list(six.iteritems({1: 2})) == [(1, 2)] and callable(base_solution_linear)
    assert logging.getLogger  # Python's own
    return {"add_or_sub": lambda: _add(*entropy_fn((0, 9))), "deep": {"one": _same}}


def test():
    return {"add_or_sub": lambda: _add(5, 9)}


def test_extra():
    return {"add_or_sub_big": lambda: _add(100, 999)}
"""


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """One with a module that imports what the package's modules import."""
    file = tmp_path / "mathematics_dataset.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        for name in ("", "modules/"):
            wheel.writestr(f"mathematics_dataset/{name}__init__.py", "")
        wheel.writestr("mathematics_dataset/modules/arithmetic.py", MODULE)
    monkeypatch.setattr(school_math, "fetch", lambda package: file)
    before = dict(sys.modules)
    yield file
    for name in set(sys.modules) - set(before):
        if name.startswith("mathematics_dataset"):
            del sys.modules[name]


def test_generators_are_imported_from_the_archive_and_nothing_else_changes(archive):
    path, diophantine = list(sys.path), sys.modules.get("sympy.solvers.diophantine")
    stood_in = {name: sys.modules.get(name) for name in ("absl", "six")}
    random.seed(3)
    np.random.seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist()
    found = school_math.problems(["arithmetic/add_or_sub"], "train", 20, seed=0)
    assert len(dict(found)) == 20
    assert all(eval(" + ".join(q.split()[0:3:2])) == int(a) for q, a in found)
    assert found == school_math.problems(["arithmetic/add_or_sub"], "train", 20, seed=0)
    assert found != school_math.problems(["arithmetic/add_or_sub"], "train", 20, seed=1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert sys.path == path
    assert all(sys.modules.get(name) is module for name, module in stood_in.items())
    assert diophantine is None or sys.modules["sympy.solvers.diophantine"] is diophantine


def test_larger_problems_and_modules_with_few_problems(archive):
    large = school_math.problems(["arithmetic/add_or_sub"], "extrapolate", 5, seed=0)
    assert len(large) == 5 and all(len(question.split()[0]) == 3 for question, _ in large)
    assert school_math.problems(["arithmetic/one"], "train", 5, seed=0) == [("1 + 1", "2")]


@pytest.mark.parametrize("name", ["arithmetic/none", "nothing/at_all"])
def test_an_unknown_module_is_named(archive, name):
    with pytest.raises(ValueError, match=f"--modules must be .*{name.split('/')[0]}"):
        school_math.problems([name], "train", 5, seed=0)


@pytest.mark.slow
def test_the_recipe_on_the_generators(archive, tmp_path):
    more = ["--modules", "arithmetic/add_or_sub", "--train_samples", 16, "--eval_samples", 4, "--max_new_tokens", 3]
    lines = mathematics.main(byte_llama.arguments(tmp_path, *more, "--method", "lora", "flat"))
    metrics = {line["metric"] for line in lines}
    assert {"accuracy_interpolate", "accuracy_extrapolate", "train_loss"} <= metrics
    rows = (tmp_path / "out/flat-seed0/answers-interpolate.jsonl").read_text().splitlines()
    assert [json.loads(row).keys() for row in rows] == [{"question", "text", "found", "right", "correct"}] * 4
    asked = {json.loads(row)["question"] for row in rows}
    assert not asked & {question for question, _ in school_math.problems(["arithmetic/add_or_sub"], "train", 16, 0)}


def test_the_recipe_on_a_file_of_ones_own(tmp_path, monkeypatch):
    """A model that says the right answers has all of them right."""
    file = tmp_path / "mine.jsonl"
    rows = [{"question": f"{k} + 1?", "answer": f"It is\n#### {k + 1}"} for k in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def right(model, tokenizer, prompts, max_new_tokens):
        return [f"#### {int(prompt.split()[1]) + 1}.0" for prompt in prompts]

    monkeypatch.setattr(mathematics.generation, "answers", right)
    lines = mathematics.main(byte_llama.arguments(tmp_path, "--dataset", file, "--method", "lora"))
    assert {line["metric"]: line["mean"] for line in lines}["accuracy_test"] == 1


@pytest.mark.thorough
@pytest.mark.slow
def test_the_generators_of_the_package_that_the_recipe_names_work():
    """With the archive from PyPI."""
    for name, larger in school_math.EXTRAPOLATE.items():
        if name != "numbers/round_number":  # asks randrange for a float, which newer Pythons refuse
            for kind in school_math.KINDS:
                assert len(school_math.problems([name], kind, 3, seed=0)) == 3, (name, larger)
