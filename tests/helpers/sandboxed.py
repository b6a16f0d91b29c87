"""Run code in the sandbox of the recipes, and look for what it leaves behind."""

import sys
import textwrap
import time
from contextlib import suppress

import psutil
from recipe import sandbox
from recipe.sandbox import Limits, Program, run

FILTERS = sandbox.sandbox_inside.filter_works()
NAMESPACES = [name for name in ("bwrap", "unshare") if sys.platform == "linux" and sandbox.works(name)]
CONTAINED = NAMESPACES if FILTERS else []  # by all layers
FILTERED = [*NAMESPACES, "none"] if FILTERS else []
PATIENT = Limits(seconds=120)  # for a busy machine
UNFILTERED = Limits(seconds=120, filter=False)


def value_of(code, *arguments, mode, limits=None):
    """What `attack(*arguments)` of the code returns; the reason of the verdict if it returns nothing."""
    test = f"def check(candidate): raise Exception('returned ' + repr(candidate(*{arguments!r})))"
    reason = run(Program(textwrap.dedent(code), "attack", test), mode, limits or PATIENT).reason
    return reason.removeprefix("Exception: returned ")


def verdict(code, mode, test="assert candidate(2) == 4", limits=None):
    """Of code that should double a number."""
    return run(Program(textwrap.dedent(code), "double", f"def check(candidate): {test}"), mode, limits or PATIENT)


def started():
    """Processes of a sandbox that are alive."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline()[-1:] in (["candidate"], ["judge"]) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return set(found)


def none_left(before):
    """Whether what was started since then has ended; the kernel takes a moment."""
    deadline = time.monotonic() + 10
    while started() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    return not started() - before


TRY = """
    def refused(function, *arguments):
        try:
            function(*arguments)
        except (OSError, RuntimeError, MemoryError) as error:
            return True
        return False
"""
