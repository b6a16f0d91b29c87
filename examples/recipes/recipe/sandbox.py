"""Generated code runs here: confined by the kernel, and judged by another process.

Two processes are started per program. The *candidate* has the generated code. The *judge* has the tests, calls the
code's functions through a pipe, and says whether the tests passed. The candidate can only answer calls, with plain
data, and the judge compares. So an exit code, a print, a patched `assert` or `==` decide nothing: a program passes if
it returns what the tests want, and in no other way.

Both are confined, in layers:

1. *A filter of system calls* (seccomp, x86-64 Linux): what computes, waits and opens files for reading is allowed;
   starting processes or threads, sockets, signals, and writing, making, removing or renaming files is refused.
2. *Namespaces*, by bubblewrap (`bwrap`) or, without it, by util-linux' `unshare`: the only files are Python's and the
   system's libraries, read-only, and an empty folder; there is no network device and no other process.
3. *Limits*: memory, processor time, open files, no written byte and no process more (`setrlimit`), bytes of an answer,
   and a deadline, after which both are killed with all that they started.

Where the first or the second is missing, `missing` says what is not contained.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from . import sandbox_inside

MODES = ("bwrap", "unshare", "none")
# Arguments: a folder for the new root, the number of folders, the folders, the command
NEW_ROOT = """
set -e
root=$1; count=$2; shift 2
mount -t tmpfs -o size=1m,mode=755 none "$root"
while [ "$count" -gt 0 ]; do
    mkdir -p "$root$1"; mount --bind "$1" "$root$1"; mount -o remount,bind,ro "$root$1"
    shift; count=$((count - 1))
done
mkdir "$root/empty"; mount -o remount,bind,ro "$root"; cd "$root"
exec chroot . /bin/sh -c 'cd /empty; exec "$@"' sh "$@"
"""


@dataclass(frozen=True)
class Limits:
    """Of each of the two processes, and of both together.

    Attributes:
        seconds: until both are killed.
        memory: bytes of address space.
        answer: bytes of what a call returns.
        filter: whether system calls are filtered; default: where it can be.
    """

    seconds: float = 10.0
    memory: int = 512 * 2**20
    answer: int = 2**20
    filter: bool = field(default_factory=sandbox_inside.filter_works)

    def of_process(self) -> dict[str, int]:
        cpu = int(self.seconds) + 1
        return {
            **{"RLIMIT_AS": self.memory, "RLIMIT_CPU": cpu, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": 64},
            **{"RLIMIT_NPROC": 0, "RLIMIT_CORE": 0, "RLIMIT_MSGQUEUE": 0, "RLIMIT_MEMLOCK": 0},
            "filter": int(self.filter),
        }


@dataclass(frozen=True)
class Program:
    """Generated code and its tests, in the form of HumanEval.

    Attributes:
        code: defines `entry_point`.
        test: defines `check(candidate)`, which raises if the code is wrong.
        given: trusted code that the tests may use (functions that the problem gives).
    """

    code: str
    entry_point: str
    test: str
    given: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether all tests passed, and if not, why."""

    passed: bool
    reason: str


class NotIsolated(RuntimeError):
    """Generated code would not be contained here."""


@cache
def mode() -> str:
    """The best of `MODES` that works here, found by running a program.

    Raises:
        NotIsolated: no Linux: nothing can be run.
    """
    if sys.platform != "linux":
        raise NotIsolated("generated code runs on Linux only; use a container or a virtual machine with Linux")
    return next(name for name in MODES if works(name))


def works(name: str) -> bool:
    """Whether a program runs in this mode."""
    trial = Program("def f(x): return x + 1", "f", "def check(candidate): assert candidate(1) == 2")
    try:
        return run(trial, name, Limits(seconds=60)).passed  # also on a busy machine
    except FileNotFoundError:  # bwrap, unshare or setpriv is not installed
        return False


def missing(name: str) -> list[str]:
    """What is not contained in this mode, a sentence each; empty where all is."""
    found = []
    if not sandbox_inside.filter_works():
        found.append(
            "System calls are not filtered (the filter is for x86-64 Linux): the code can start processes if you are "
            "root, send signals to the processes that it sees, and attack the kernel by any call."
        )
        if name == "none":
            found.append("The code can open sockets, and remove or empty files that you can write.")
    if name == "none":
        found.append(
            "Neither bubblewrap nor user namespaces work here: the code can read every file that you can read, the "
            "tests included. Install bubblewrap (apt install bubblewrap)."
        )
    return found


def check_isolation(accept_risk: bool = False) -> str:
    """The mode in which code will run; prints it, with what is missing.

    Raises:
        NotIsolated: something is not contained and the user has not accepted it.
    """
    name = mode()
    lacks = missing(name)
    if lacks and not accept_risk:
        raise NotIsolated(
            "Generated code would not be contained:\n- " + "\n- ".join(lacks) + "\nIf you accept this (in a container "
            "that holds nothing of value, for instance), give --accept_risk beside --execute."
        )
    print(f"Generated code runs isolated by: {name}, {'not contained: ' + ' '.join(lacks) if lacks else 'all layers'}")
    return name


def run(program: Program, name: str, limits: Limits | None = None) -> Verdict:
    """Run the tests of one program."""
    limits = limits or Limits()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        to_code, from_judge = _pipe(stack)
        to_judge, from_code = _pipe(stack)
        _start(stack, name, folder, "candidate", stdin=to_code, stdout=from_code)
        judge = _start(stack, name, folder, "judge", subprocess.PIPE, subprocess.PIPE, (from_judge, to_judge))
        for end in (to_code, from_code, from_judge, to_judge):
            end.close()  # so that the end of one process is seen by the other
        job = {**vars(program), "to": from_judge.number, "back": to_judge.number}
        job |= {"limits": limits.of_process(), "longest": limits.answer}
        try:
            out, _ = judge.communicate(json.dumps(job).encode() + b"\n", timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"no verdict after {limits.seconds} seconds")
        return Verdict(**json.loads(out)) if out else Verdict(False, f"no verdict (status {judge.returncode})")


def run_many(programs: Sequence[Program], name: str, limits: Limits | None = None) -> list[Verdict]:
    """The verdicts, two programs at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(tqdm(pool.map(lambda p: run(p, name, limits), programs), "tests", len(programs), leave=False))


class _End:
    """One end of a pipe, closed once."""

    def __init__(self, number: int) -> None:
        self.number, self.open = number, True

    def fileno(self) -> int:
        return self.number

    def close(self) -> None:
        if self.open:
            self.open = False
            os.close(self.number)


def _pipe(stack: ExitStack) -> tuple[_End, _End]:
    """(end to read, end to write)."""
    ends = tuple(map(_End, os.pipe()))
    for end in ends:
        stack.callback(end.close)
    return ends


def _start(
    stack: ExitStack, name: str, folder: str, role: str, stdin: Any, stdout: Any, more: Iterable[_End] = ()
) -> subprocess.Popen[bytes]:
    """The process of a role, which is killed with all that it started when the stack ends."""
    source = Path(sandbox_inside.__file__).read_text()
    process = subprocess.Popen(
        [*_wrapped(name, folder), _python(), "-I", "-S", "-B", "-c", source, role],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        pass_fds=[end.number for end in more],
        cwd=folder,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        start_new_session=True,
    )
    stack.callback(process.communicate)
    stack.callback(_kill, process)
    return process


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its group; in namespaces the kernel then ends all that is in them."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _python() -> str:
    """The interpreter itself, not that of a virtual environment, which has no library of its own."""
    return os.path.realpath(sys.executable)


def _folders() -> list[str]:
    """What Python needs to start: its own folder, and the system's libraries."""
    found = dict.fromkeys(["/usr", "/lib", "/lib64", "/bin", sys.base_prefix])
    return [path for path in found if os.path.isdir(path) and not (path != "/usr" and path.startswith("/usr/"))]


def _wrapped(name: str, folder: str) -> list[str]:
    """The command before the interpreter that puts it into namespaces of its own."""
    if name == "none":
        return []
    if name == "bwrap":
        binds = [word for path in _folders() for word in ("--ro-bind", path, path)]
        alone = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        # the root of bubblewrap is in memory: an empty folder in it, then nothing of it can be written
        rest = ["--dir", "/empty", "--remount-ro", "/", "--chdir", "/empty"]
        return [shutil.which("bwrap") or "bwrap", *alone, *binds, *rest]
    kinds = ["--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child=KILL"]
    folders = _folders()
    return [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        *kinds,
        "/bin/sh",
        "-c",
        NEW_ROOT,
        "sh",
        folder,
        str(len(folders)),
        *folders,
    ]
