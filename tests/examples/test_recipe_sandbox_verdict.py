"""The verdict on generated code: right code passes, and no wrong code does, whatever it tries."""

import json
import sys
import textwrap

import pytest
from helpers.processes import patient
from helpers.sandboxed import NAMESPACES, PATIENT, verdict
from recipe import sandbox
from recipe.sandbox import Program, run

pytestmark = [patient, pytest.mark.skipif(sys.platform != "linux", reason="generated code runs on Linux only")]


@pytest.mark.parametrize("mode", [*NAMESPACES, "none"])
def test_right_code_passes_and_wrong_code_does_not(mode):
    assert verdict("def double(x): return 2 * x", mode) == sandbox.Verdict(True, "")
    assert verdict("def double(x): return 3 * x", mode).reason == "AssertionError: "
    assert "SyntaxError" in verdict("def double(x) return", mode).reason
    assert "KeyError" in verdict("def triple(x): return 3 * x", mode).reason


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1,
        -2.5,
        float("inf"),
        "a\n\u20ac",
        b"\x00",
        1j,
        [1, (2, [3])],
        {(1, 2): {3}},  # of one element: repr shows more of them in any order
        frozenset({1}),
        {},
    ],
    ids=repr,
)
def test_values_arrive_with_their_types(value):
    inside = sandbox.sandbox_inside
    arrived = inside.unpack(json.loads(json.dumps(inside.pack(value))))
    assert arrived == value and type(arrived) is type(value) and repr(arrived) == repr(value)


def test_a_problem_may_give_functions_to_its_tests():
    code = "def other(x): return x\ndef double(x): return 2 * x"
    program = Program(
        code, "double", "def check(candidate): assert candidate(other(1)) == 4", "def other(x): return x + 1"
    )
    assert run(program, sandbox.mode(), PATIENT).passed


def test_a_test_may_call_the_function_by_its_own_name():
    """As HumanEval's test of `sort_third` does. The problem's own head of the function is not what it calls."""
    test = "def check(candidate): assert double(2) == candidate(2) == 4"
    program = Program("def double(x): return 2 * x", "double", test, given="def double(x):\n    'Double.'")
    assert run(program, sandbox.mode(), PATIENT).passed


def test_many_programs_at_once_keep_their_order():
    programs = [
        Program(f"def f(): return {k}", "f", f"def check(candidate): assert candidate() == {k % 3}") for k in range(6)
    ]
    assert [v.passed for v in sandbox.run_many(programs, sandbox.mode(), PATIENT)] == [True] * 3 + [False] * 3


# --- the verdict cannot be forged

FORGERIES = {
    "os._exit(0) at once": "import os; os._exit(0)",
    "os._exit(0) in the call": "import os\ndef double(x): os._exit(0)",
    "sys.exit(0)": "import sys\ndef double(x): sys.exit(0)",
    "sys.exit(0) at once": "import sys; sys.exit(0)",
    "print": 'print(\'{"passed": true, "reason": ""}\', flush=True)\ndef double(x): print(\'passed\')',
    "write to all descriptors": """
        import os
        def double(x):
            for k in range(64):
                try: os.write(k, b'{"passed": true, "reason": ""}\\n')
                except OSError: pass
    """,
    "builtins": """
        import builtins
        builtins.AssertionError = type("Fine", (Exception,), {})
        builtins.Exception = builtins.BaseException = builtins.AssertionError
        builtins.compile = builtins.exec = lambda *arguments: None
        def double(x): return 5
    """,
    "an equal to all": """
        class All(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
        def double(x): return All(5)
    """,
    "an object": "class All:\n    def __eq__(self, other): return True\ndef double(x): return All()",
    "another pack": """
        import sys
        def double(x): return 5
        main = sys.modules["__main__"]
        main.pack = lambda value: {"passed": True}
    """,
    "check of one's own": "def check(candidate): pass\ndef double(x): return 5",
    "an answer without a value": """
        import sys
        sys.modules["__main__"].pack = lambda value: {"list": 1, "set": [[]]}
        def double(x): return 5
    """,
    "deep nesting": "def double(x):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "an answer of gigabytes": "def double(x): return 'x' * 10**8",
    "swallowed exceptions": """
        def double(x):
            try: raise SystemExit
            finally: return 5
    """,
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_verdict_cannot_be_forged(forgery):
    found = verdict(FORGERIES[forgery], sandbox.mode())
    assert not found.passed
    assert "seconds" not in found.reason  # it did not need the deadline


def test_the_tests_are_not_in_the_process_of_the_code():
    secret = "quite " + "secret"
    code = """
        import gc, sys
        def attack(*arguments):
            frame, seen = sys._getframe(), []
            while frame:
                seen += [repr(v) for v in (*frame.f_locals.values(), *frame.f_globals.values())]
                frame = frame.f_back
            seen += [repr(o) for o in gc.get_objects()]
            return ["".join(("quite", " ", "secret")) in text for text in seen].count(True)
    """
    test = f"def check(candidate):\n    '{secret}'\n    n = candidate()\n    raise Exception(f'found {{n}}')"
    assert run(Program(textwrap.dedent(code), "attack", test), sandbox.mode(), PATIENT).reason == "Exception: found 0"
