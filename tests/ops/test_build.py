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
    """The commands of pyproject.toml, as an editable install runs them."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "flatlora", folder / "flatlora", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "import setuptools; setuptools.setup()", "build_ext", "--inplace"],
        cwd=folder, env={**os.environ, **flags}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_kernel_has_no_python_version_in_its_name_and_exports_only_its_own_functions(tmp_path):
    log = build(tmp_path, {})
    (library,) = (tmp_path / "flatlora").rglob("*.so")
    assert library == tmp_path / "flatlora" / "ops" / "_noise.so"
    assert "-fno-math-errno" in log and "-march" not in log
    if (nm := shutil.which("nm")) and sys.platform == "linux":
        done = subprocess.run([nm, "-D", "--defined-only", library], capture_output=True, text=True, check=True)
        names = {line.split()[-1] for line in done.stdout.splitlines()}
        assert "flatlora_perturb" in names
        assert {name for name in names if not name.startswith("flatlora_")} <= {"_init", "_fini"}


@pytest.mark.parametrize("flags", [{"CFLAGS": "-Ofast"}, {"CFLAGS": "-O2 -ffast-math", "LDFLAGS": "-Ofast"}], ids=str)
def test_fast_math_flags_do_not_reach_the_process(tmp_path, flags):
    log = build(tmp_path, flags)
    assert "-Ofast" not in log and "-ffast-math" not in log
    assert after_loading(tmp_path / "flatlora" / "ops" / "_noise.so") == "kept"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"], ids=["missing", "failing"])
def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path, compiler):
    log = build(tmp_path, {"CC": compiler})
    assert 'building extension "flatlora.ops._noise" failed' in log
    assert not list(tmp_path.rglob("*.so"))


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
