"""What runs inside the sandbox, with the standard library alone: see `sandbox.py`.

    python -I -S -c SOURCE candidate     reads its code from stdin, then answers calls
    python -I -S -c SOURCE judge         reads the job from stdin, runs the tests, writes the verdict to stdout

Both confine themselves before they read any code. The process limits and the filter cannot be taken back.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import struct
import sys
from typing import Any, BinaryIO

READS_AND_WAITS = {  # system calls of x86-64 that compute, wait, and read; all others are refused
    **{"read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9},
    **{"mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15},
    **{"pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25},
    **{"madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "alarm": 37, "setitimer": 38},
    **{"getpid": 39, "exit": 60, "uname": 63, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrlimit": 97},
    **{"getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108},
    **{"getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204},
    **{"getdents64": 217, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229},
    **{"clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262, "readlinkat": 267, "faccessat": 269},
    **{"pselect6": 270, "ppoll": 271, "dup3": 292, "getrandom": 318, "statx": 332, "faccessat2": 439},
}
OPEN, OPENAT, FCNTL = 2, 257, 72
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000  # the last is O_TMPFILE's own
HARMLESS_FCNTL = (1, 2, 3, 1030)  # F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC; F_SETOWN could send signals
X86_64, EPERM = 0xC000003E, 1
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | EPERM, 0x80000000
LOAD, EQUAL, ANY_BIT, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # BPF


def confine(limits: dict[str, int]) -> None:
    """Limit what this process may use, then what it may ask the kernel for.

    Raises:
        OSError: the kernel refuses the filter.
    """
    import resource  # Windows has none

    for name, value in limits.items():
        if name.startswith("RLIMIT_"):
            resource.setrlimit(getattr(resource, name), (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: other processes of the user cannot read the memory of this one
    if not limits["filter"]:
        return
    program = seccomp_filter()
    steps = ctypes.create_string_buffer(program)
    prog = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(steps)))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, prog, 0, 0):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
        raise OSError(ctypes.get_errno(), "the kernel refuses the filter of system calls")


def filter_works() -> bool:
    """Whether the filter is written for this system."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and struct.calcsize("P") == 8


def seccomp_filter() -> bytes:
    """The BPF program: `READS_AND_WAITS`, files opened for reading alone, nothing else.

    It reads `struct seccomp_data`: the number at 0, the architecture at 4, argument k at 16 + 8k.
    """
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, X86_64), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    steps += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, REFUSE)]  # the numbers of x32
    for number in READS_AND_WAITS.values():
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for number, argument in ((OPEN, 1), (OPENAT, 2)):
        steps += [(EQUAL, 0, 4, number), (LOAD, 0, 0, 16 + 8 * argument), (ANY_BIT, 0, 1, WRITES)]
        steps += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    steps += [(EQUAL, 1, 0, FCNTL), (RETURN, 0, 0, REFUSE), (LOAD, 0, 0, 16 + 8)]
    for command in HARMLESS_FCNTL:
        steps += [(EQUAL, 0, 1, command), (RETURN, 0, 0, ALLOW)]
    steps += [(RETURN, 0, 0, REFUSE)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


# --- values between the two processes: plain data, of exactly these types


def pack(value: Any) -> Any:
    """A value as JSON. That of a subclass arrives as the plain one: nothing but data reaches the judge.

    Raises:
        TypeError: a value of another type.
    """
    if value is None or isinstance(value, (int, float, str)):
        return value
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(item) for item in value]}
    raise TypeError(f"only plain data can be returned, got {type(value).__name__}")


def unpack(value: Any) -> Any:
    """The value that `pack` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "bytes":
        return bytes.fromhex(items)
    if kind == "complex":
        return complex(*items)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in items}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(unpack, items))


def write_line(file: BinaryIO, value: Any) -> None:
    file.write(json.dumps(value).encode() + b"\n")
    file.flush()


def read_line(file: BinaryIO, longest: int) -> Any:
    """The next line; EOFError if there is none, ValueError if it is too long."""
    line = file.readline(longest + 1)
    if not line:
        raise EOFError("the code has ended its process")
    if len(line) > longest:
        raise ValueError(f"the code returned more than {longest} bytes")
    return json.loads(line)


# --- the two processes


def silence(kept: int) -> BinaryIO:
    """A file on another number for what descriptor `kept` is now; the number itself then leads to nothing."""
    file = os.fdopen(os.dup(kept), "rb" if kept == 0 else "wb")
    os.dup2(2, kept)  # stderr is /dev/null
    return file


def candidate() -> None:
    """Run the code, then answer calls of its functions: data in, data out."""
    calls, answers = silence(0), silence(1)
    job = read_line(calls, 1 << 24)
    confine(job["limits"])
    space: dict[str, Any] = {"__name__": "candidate"}
    failure = ""
    try:
        exec(compile(job["code"], "candidate", "exec"), space)
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"[:500]
    while True:
        try:
            name, arguments, named = unpack(read_line(calls, 1 << 24))
        except EOFError:
            return
        try:
            if failure:
                raise RuntimeError(failure)
            answer = {"value": pack(space[name](*arguments, **named))}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        write_line(answers, answer)


class CandidateError(Exception):
    """The code raised, ended, or returned what is no plain data."""


def judge() -> None:
    """Run the tests, which call the code in the other process. The verdict is decided and written here alone."""
    start, verdict = silence(0), silence(1)
    job = read_line(start, 1 << 24)
    to, back = os.fdopen(job["to"], "wb"), os.fdopen(job["back"], "rb")
    confine(job["limits"])
    write_line(to, {"code": job["code"], "limits": job["limits"]})

    def call(*arguments: Any, **named: Any) -> Any:
        write_line(to, pack([job["entry_point"], list(arguments), named]))
        answer = read_line(back, job["longest"])
        if "value" not in answer:
            raise CandidateError(answer["error"])
        return unpack(answer["value"])

    space: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(job["given"], "given", "exec"), space)
        space[job["entry_point"]] = call  # a test of HumanEval calls the function by its own name
        exec(compile(job["test"], "test", "exec"), space)
        space["check"](call)
    except BaseException as error:
        write_line(verdict, {"passed": False, "reason": f"{type(error).__name__}: {error}"[:500]})
    else:
        write_line(verdict, {"passed": True, "reason": ""})


if __name__ == "__main__":
    {"candidate": candidate, "judge": judge}[sys.argv[1]]()
