"""Build the C kernel, the wheel and the source archive; pyproject.toml names these setuptools commands.

The kernel is a plain shared library loaded with ctypes, not a Python module: one wheel serves every Python version, and
without a compiler the install goes on without it. setuptools loads this file by its path, so that a build imports
neither `flatlora` nor torch.
"""

from __future__ import annotations

import os
import shutil

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

# No -march: the instruction set is chosen at run time. Compilers vectorize these loops only where sqrtf need not set
# errno, comparisons need not trap, and signed integers need not wrap (Python's own flags contain -fwrapv).
GNU = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-wrapv", "-ffp-contract=fast", "-g0"]
FLAGS = {"unix": [*GNU, "-fvisibility=hidden"], "mingw32": GNU, "msvc": ["/O2", "/fp:contract"]}
# A library linked with one of these flags makes the processor flush subnormal numbers to zero in the whole process.
# The kernel also compares norms with infinity, which -ffinite-math-only removes.
FAST_MATH = {"-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-ffinite-math-only", "-mdaz-ftz"}
LIBRARIES = {"unix": ["m", "dl", "pthread"]}
# Folders that the source archive has beside the package.
SOURCE_FOLDERS = ("flatlora", "tests", "examples", ".ci", ".docs", ".github")


class BuildLibrary(build_ext):
    """Compile a shared library without Python's module suffix, and without the user's fast-math flags."""

    def build_extension(self, ext: Extension) -> None:
        for command in ("compiler", "compiler_so", "linker_so"):  # these include the user's CFLAGS and LDFLAGS
            words = getattr(self.compiler, command, None)
            if words is not None:
                setattr(self.compiler, command, [word for word in words if word not in FAST_MATH])
        ext.extra_compile_args = FLAGS.get(self.compiler.compiler_type, [])
        ext.libraries = LIBRARIES.get(self.compiler.compiler_type, [])
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class PlatformWheel(bdist_wheel):
    """Tag the wheel `py3-none-<platform>`, and start from an empty build folder."""

    def run(self) -> None:
        if not self.skip_build:  # files of an earlier build would be packed too, also those of deleted modules
            for folder in (self.get_finalized_command("build").build_lib, self.bdist_dir):
                shutil.rmtree(folder, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class SourceArchive(sdist):
    """Add the tests and everything that they read."""

    def make_distribution(self) -> None:
        for folder in filter(os.path.isdir, SOURCE_FOLDERS):
            self.filelist.graft(folder)
        for pattern in ("*.py[cod]", "*.so", "*/__pycache__/*"):
            self.filelist.global_exclude(pattern)
        super().make_distribution()
