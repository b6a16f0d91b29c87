"""The kernel as it is compiled: under sanitizers, and with flags that would change the arithmetic of the process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "flatlora" / "ops" / "csrc"
CC = shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(CC is None or not SOURCE.exists(), reason="needs a C compiler and the source tree")
OPERANDS = ["W", "OUT", "NORMS", "KEY", "INDEX", "B", "A"]  # the enum of sanitized.c


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Runs the driver with these arguments."""
    program = tmp_path_factory.mktemp("sanitized") / "sanitized"
    command = [
        CC, "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=fast",
        f"-I{SOURCE}", str(Path(__file__).with_name("sanitized.c")), "-o", str(program), "-lm", "-ldl", "-lpthread",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return lambda *arguments: subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)


def test_the_kernel_under_sanitizers(sanitized):
    done = sanitized("2000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"2000 cases, \d kernels", done.stdout)


@pytest.mark.parametrize("operand", OPERANDS)
def test_the_sanitizers_see_an_operand_that_is_too_short(sanitized, operand):
    done = sanitized(str(OPERANDS.index(operand)), "short")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


LOADED = """
import ctypes, sys
def subnormal():
    return float("5e-324") * 1.0 != 0
assert subnormal()
ctypes.CDLL(sys.argv[1])
print("kept" if subnormal() else "flushed")
"""


def after_loading(library):
    return subprocess.run([sys.executable, "-c", LOADED, str(library)], capture_output=True, text=True).stdout.strip()


def build(folder, flags):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "flatlora", folder / "flatlora", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder, env={**os.environ, **flags}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "flatlora" / "ops" / "_noise.so"


@pytest.mark.parametrize("flags", [{"CFLAGS": "-Ofast"}, {"CFLAGS": "-O2 -ffast-math", "LDFLAGS": "-Ofast"}], ids=str)
@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
def test_fast_math_flags_do_not_reach_the_process(tmp_path, flags):
    assert after_loading(build(tmp_path, flags)) == "kept"


def test_such_a_flag_flushes_subnormal_numbers_when_it_reaches_the_linker(tmp_path):
    """What the flags do where nobody takes them out; else the test before could not fail."""
    library = tmp_path / "fast.so"
    command = [
        CC,
        "-shared",
        "-fPIC",
        "-Ofast",
        str(SOURCE / "noise.c"),
        "-o",
        str(library),
        "-lm",
        "-ldl",
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    if after_loading(library) != "flushed":
        pytest.skip("this compiler leaves the processor alone when it links a shared library")
