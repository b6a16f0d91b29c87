"""What the C kernel cannot be faster than: its instructions counted as they run, one by one, against the measured time.

    python examples/benchmarks/instructions.py          # Linux on x86-64, with objdump (binutils) and a C compiler

A forked child makes the noise of one weight on one thread, in single steps of the debugger's interface (ptrace). Each
instruction that runs inside of the library is counted, and objdump names it:

vector     arithmetic, shuffles, conversions and masks of vector registers
other      loads, stores, moves, and everything of general registers

With AVX-512 a core starts at most two vector instructions of 512 bits in a cycle, and with AVX2 three of 256 bits. So

    bound = vector instructions per weight / (those in a cycle x clock)

whatever the caches do; the clock is measured by a chain of dependent products, in the same minute. `measured` is the
least time per weight, with the weight in the cache. Of one training step, the noise alone takes at least
weights x (bound with norms + bound) / threads: W + eps with row norms in forward, and without in backward. The last
columns have that over the time of a step of plain LoRA, of `kinds.csv`.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import RESULTS, Table, provenance, read
from torch import nn
from workload import base_model

from flatlora.ops import native

AT_ONCE = {"avx2": 3, "avx512": 2, "avx512bf16": 2}  # vector instructions in a cycle
TRACE_ME, PEEK_USER, SINGLE_STEP, RIP = 0, 3, 9, 16 * 8  # of ptrace, on x86-64
MOVES = r"vmov|vbroadcast|vpbroadcast|vzero|vprefetch"  # served by load ports, or renamed: the bound leaves them out
SIZES = [(576, 576), (1536, 576), (576, 1536)]
ROWS = 8  # of the weight whose instructions are counted: a step of the debugger takes about 20 µs
CHAIN = """
#include <stdint.h>
int64_t chain(int64_t n) { int64_t x = 1; for (; n > 0; n--) __asm__ volatile(PRODUCTS : "+r"(x)); return x; }
"""


def executed(call: Callable[[], None]) -> collections.Counter[int]:
    """How often each instruction of the library runs in `call()`, by its address in the file."""
    start, end, offset = mapped(native.LIBRARY._name)
    libc, found, status = ctypes.CDLL(None, use_errno=True), collections.Counter(), 0
    libc.ptrace.restype, libc.ptrace.argtypes = ctypes.c_long, [ctypes.c_long] * 4
    child = os.fork()
    if child == 0:
        libc.ptrace(TRACE_ME, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        call()
        os._exit(0)
    while not os.WIFEXITED(status := os.waitpid(child, 0)[1]):
        if os.WIFSIGNALED(status):
            raise RuntimeError(f"the traced process ended by signal {os.WTERMSIG(status)}")
        at = libc.ptrace(PEEK_USER, child, RIP, 0)
        if start <= at < end:
            found[at - start + offset] += 1
        if libc.ptrace(SINGLE_STEP, child, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "this system does not let a process trace its child")
    if os.WEXITSTATUS(status) != 0:
        raise RuntimeError("the traced call failed")
    return found


def mapped(path: str) -> tuple[int, int, int]:
    """(first address, end, offset in the file) of the executable part of a loaded library."""
    name = os.path.realpath(path)
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if fields[-1] == name and "x" in fields[1]:
            low, high = (int(number, 16) for number in fields[0].split("-"))
            return low, high, int(fields[2], 16)
    raise RuntimeError(f"{name} is not loaded")


def disassembled(path: str) -> dict[int, str]:
    """Address in the file -> instruction."""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], check=True, capture_output=True, text=True)
    lines = re.findall(r"^\s*([0-9a-f]+):\t(.+)$", text.stdout, re.MULTILINE)
    return {int(address, 16): instruction.strip() for address, instruction in lines}


def is_vector(instruction: str) -> bool:
    """Whether it needs one of the ports of vector arithmetic (moves need none)."""
    operation = instruction.split()[0]
    return operation[0] in "vk" and not re.match(MOVES, operation)


def count(call: Callable[[], None]) -> tuple[int, int]:
    """(vector instructions, all) of a call into the library."""
    names, found = disassembled(native.LIBRARY._name), executed(call)
    return sum(n for address, n in found.items() if is_vector(names[address])), sum(found.values())


def clock() -> float:
    """Cycles per second, from a chain of dependent products: each takes three cycles on today's processors."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "chain.c"), Path(folder, "chain.so")
        source.write_text(CHAIN.replace("PRODUCTS", '"' + "imul %0, %0\\n" * 100 + '"'))
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        chain = ctypes.CDLL(str(library)).chain
    chain.argtypes = [ctypes.c_int64]
    return 3 * 100 * 50_000 / least(lambda: chain(50_000))


def least(run: Callable[[], object], rounds: int = 30) -> float:
    """The least seconds of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def noise(dtype: torch.dtype, m: int, n: int, r: int | None) -> Callable[[], None]:
    """A call that makes W + eps, with the row norms of W + s B A if there is a rank."""
    weight, key = torch.randn(m, n).to(dtype), torch.tensor([1, 2])
    out, norms = torch.empty_like(weight), torch.ones(m)
    factors = (torch.randn(m, r), torch.randn(r, n), 2.0) if r else None
    return lambda: native.perturb(weight, norms, key, 0, out, relative=0.1, factors=factors)


def bounded(dtype: torch.dtype, m: int, n: int, r: int | None) -> dict[str, str]:
    """The columns of one weight."""
    cycles = clock()
    vector, every = (c / (ROWS * n) for c in count(noise(dtype, ROWS, n, r)))
    took = least(noise(dtype, m, n, r)) / (m * n)
    kernel = native.KERNELS[native.BEST]
    return {
        "kernel": kernel, "vector instructions": f"{vector:.3f}", "instructions": f"{every:.3f}",
        "GHz": f"{cycles / 1e9:.2f}", "bound ns": f"{1e9 * vector / AT_ONCE[kernel] / cycles:.3f}",
        "measured ns": f"{1e9 * took:.3f}",
    }  # fmt: skip


def of_a_step(nanoseconds: float, threads: int = 2) -> dict[str, str]:
    """The time of the noise, in ns per weight for forward and backward, over a step of plain LoRA in bf16."""
    model = base_model("llama6", "bf16", torch.device("cpu"), 0)
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name]
    seconds = 1e-9 * nanoseconds * sum(layer.weight.numel() for layer in layers) / threads
    rows = [row for row in read(RESULTS / "kinds.csv") if (row["kind"], row["method"]) == ("plain", "lora")]
    return {f"of a step, {row['tokens']} tokens": f"{seconds / float(row['median s']):.3f}" for row in rows}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--csv", type=Path, default=RESULTS / "instructions.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = Table(options.csv, ["dtype", "m", "n", "r"], fresh=True)
    for dtype in (torch.bfloat16, torch.float32):
        for m, n in SIZES:
            found = {r: bounded(dtype, m, n, r) for r in (None, options.r)}
            both = of_a_step(sum(float(columns["bound ns"]) for columns in found.values()))
            for r, columns in found.items():
                key = {"dtype": str(dtype).removeprefix("torch."), "m": m, "n": n, "r": r or "no norms"}
                whole = both if r and dtype == torch.bfloat16 else dict.fromkeys(both, "")
                row = key | columns | whole
                table.add([row | provenance(torch.device("cpu"), 0)])
                print({name: value for name, value in row.items() if value != ""}, flush=True)


if __name__ == "__main__":
    main()
