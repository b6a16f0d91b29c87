"""Simple problems of programming on a list of numbers: one condition, one change and one way to sum up, in all ways."""

from __future__ import annotations

import random
from typing import Any

from .programs import Problem

CONDITIONS = {  # words, expression, value
    **{"even": ("that are even", "n % 2 == 0", lambda n, k: n % 2 == 0)},
    **{"odd": ("that are odd", "n % 2 == 1", lambda n, k: n % 2 == 1)},
    **{"positive": ("that are positive", "n > 0", lambda n, k: n > 0)},
    **{"negative": ("that are negative", "n < 0", lambda n, k: n < 0)},
    **{"above": ("that are larger than {k}", "n > {k}", lambda n, k: n > k)},
    **{"below": ("that are smaller than {k}", "n < {k}", lambda n, k: n < k)},
    **{"divisible": ("that are divisible by {k}", "n % {k} == 0", lambda n, k: n % k == 0)},
}
CHANGES = {
    **{
        "": ("the numbers", "n", lambda n, k: n),
        "squared": ("the squares of the numbers", "n * n", lambda n, k: n * n),
    },
    **{"doubled": ("the doubles of the numbers", "2 * n", lambda n, k: 2 * n)},
    **{"increased": ("{k} more than each of the numbers", "n + {k}", lambda n, k: n + k)},
    **{"absolute": ("the absolute values of the numbers", "abs(n)", lambda n, k: abs(n))},
}
SUMS = {
    **{"list": ("a list of", "[{each}]", list), "sum": ("the sum of", "sum({each})", sum)},
    **{"largest": ("the largest of", "max(({each}), default=None)", lambda v: max(v, default=None))},
    **{"smallest": ("the smallest of", "min(({each}), default=None)", lambda v: min(v, default=None))},
    **{
        "set": ("the set of", "set({each})", set),
        "reversed": ("a reversed list of", "[{each}][::-1]", lambda v: v[::-1]),
    },
}


def all_functions(seed: int = 0, tests: int = 4) -> list[Problem]:
    """Every combination of a condition, a change and a way to sum up, 210 problems, shuffled.

    A test compares with values computed here, of random lists and of the empty one.
    """
    rng = random.Random(seed)
    keys = [(s, change, condition) for s in SUMS for change in CHANGES for condition in CONDITIONS]
    return [_function(*key, rng=rng, tests=tests) for key in rng.sample(keys, len(keys))]


def _function(way: str, change: str, condition: str, rng: random.Random, tests: int) -> Problem:
    k, j = rng.randint(2, 9), rng.randint(2, 9)
    name = "_".join(filter(None, (way, change, condition)))
    words = f"{SUMS[way][0]} {CHANGES[change][0].format(k=j)} {CONDITIONS[condition][0].format(k=k)}"
    each = f"{CHANGES[change][1].format(k=j)} for n in numbers if {CONDITIONS[condition][1].format(k=k)}"
    lists: list[list[int]] = [[], *([rng.randint(-20, 20) for _ in range(rng.randint(3, 8))] for _ in range(tests))]

    def right(numbers: list[int]) -> Any:
        return SUMS[way][2]([CHANGES[change][2](n, j) for n in numbers if CONDITIONS[condition][2](n, k)])

    lines = [f"    assert candidate({numbers}) == {right(numbers)!r}" for numbers in lists]
    return Problem(
        prompt=f'def {name}(numbers):\n    """Return {words}."""\n',
        entry_point=name,
        test="\n".join(["def check(candidate):", *lines]) + "\n",
        solution=f"    return {SUMS[way][1].format(each=each)}\n",
    )
