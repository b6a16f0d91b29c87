"""Problems of the Mathematics Dataset (Saxton et al., arXiv 1904.01557) by its generators, from its package on PyPI.

The package asks for `absl`, for `six`, and for a sympy in which `sympy.solvers.diophantine` is a module; it cannot be
installed beside torch's sympy and numpy 2. Its files are pure Python, so they are imported from the archive, whose hash
is checked, while stand-ins for those three are in place. Generators that need what numpy 2 lacks (`ndarray.itemset`) do
not run: all of calculus and most of polynomials.
"""

from __future__ import annotations

import importlib
import logging
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from common.packages import Package, fetch

ARCHIVE = Package(
    requirement="mathematics-dataset==1.0.1",
    archive="mathematics_dataset-1.0.1-py3-none-any.whl",
    sha256="8ebfe083ed65e07a9a555c9a51449c8e7c0ee097a96880a7183d2e8606081de6",
    about="generators of school mathematics, Apache-2.0, 94 kB; imported from the archive",
)
KINDS = ("train", "interpolate", "extrapolate")
EXTRAPOLATE = {  # the generators of larger problems that go with one of training
    "arithmetic/add_or_sub": "arithmetic/add_or_sub_big",
    "arithmetic/mul": "arithmetic/mul_big",
    "arithmetic/div": "arithmetic/div_big",
    "arithmetic/add_sub_multiple": "arithmetic/add_sub_multiple_longer",
    "comparison/kth_biggest": "comparison/kth_biggest_more",
    "comparison/sort": "comparison/sort_more",
    "comparison/closest": "comparison/closest_more",
    "numbers/place_value": "numbers/place_value_big",
    "numbers/round_number": "numbers/round_number_big",
}
Generator = Callable[[], Any]


def problems(modules: Sequence[str], kind: str, count: int, seed: int) -> list[tuple[str, str]]:
    """(question, answer) of `count` different problems, as many of each module.

    Args:
        modules: names such as "numbers/place_value".
        kind: one of `KINDS`: the distribution of training, one of the same difficulty, or a harder one. A module
            without larger problems has none in "extrapolate".

    Raises:
        ValueError: an unknown module.
    """
    if kind == "extrapolate":
        modules = [EXTRAPOLATE[name] for name in modules if name in EXTRAPOLATE]
    known = generators(kind, {name.split("/")[0] for name in modules})
    if unknown := [name for name in modules if name not in known]:
        raise ValueError(f"--modules must be of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    found: list[tuple[str, str]] = []
    with _seeded(f"{kind} {seed}"):
        for k, name in enumerate(modules):
            own: dict[str, str] = {}
            wanted = count * (k + 1) // len(modules) - count * k // len(modules)
            for _ in range(20 * wanted):  # a module may have few different problems
                if len(own) == wanted:
                    break
                problem = known[name]()
                own.setdefault(str(problem.question), str(problem.answer))
            found += own.items()
    return random.Random(seed).sample(found, len(found))


def generators(kind: str, topics: set[str]) -> dict[str, Generator]:
    """Those of the package by their names, `topic/name`."""
    made = {}
    for topic in sorted(topics):
        try:
            with _importable():
                module = importlib.import_module(f"mathematics_dataset.modules.{topic}")
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--modules must be names such as numbers/place_value, got {topic}/... ({error})"
            ) from None
        tree = {"train": lambda m=module: m.train(tuple), "interpolate": module.test, "extrapolate": module.test_extra}
        made |= {f"{topic}/{name}": function for name, function in _leaves(tree[kind]())}
    return made


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Generator]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield name, value


@contextmanager
def _importable() -> Iterator[None]:
    """The archive on the path, and the stand-ins; afterwards what was there before."""
    solvers = importlib.import_module("sympy.solvers.diophantine.diophantine")
    stand_ins = {name: types.ModuleType(name) for name in ("absl", "six.moves")}
    stand_ins["absl"].__dict__.update(logging=logging)
    stand_ins["six.moves"].__dict__.update(range=range, zip=zip)
    stand_ins |= {"six": _six(), "sympy.solvers.diophantine": solvers}
    before = {name: sys.modules.get(name) for name in stand_ins}
    archive = str(fetch(ARCHIVE))
    sys.modules.update(stand_ins)
    sys.path.append(archive)
    try:
        yield
    finally:
        sys.path.remove(archive)
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _six() -> types.ModuleType:
    """What the package uses of it, for Python 3."""
    made = types.ModuleType("six")
    made.__dict__.update(
        integer_types=(int,), string_types=(str,), iterkeys=iter,
        iteritems=lambda mapping: iter(mapping.items()), itervalues=lambda mapping: iter(mapping.values()),
        add_metaclass=lambda meta: lambda kind: kind,  # abstract methods are then not enforced
    )  # fmt: skip
    return made


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """The generators draw from the global generators of Python and numpy: seeded here, then as before."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
