"""The optional C kernel of `flatlora.ops`; everything else is in pyproject.toml.

It is a plain shared library loaded with ctypes, not a Python module: one wheel serves every Python version, and without
a compiler the install goes on without it.
"""

import os
import shutil

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# No -march: the instruction set is chosen at run time. The loops are vectorised only where sqrtf need not set errno,
# comparisons need not trap, and signed integers need not wrap (-fwrapv comes with Python's own flags).
GNU = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-wrapv", "-ffp-contract=fast", "-g0"]
FLAGS = {"unix": [*GNU, "-fvisibility=hidden"], "mingw32": GNU, "msvc": ["/O2", "/fp:contract"]}
# A library linked with one of these makes the processor take subnormal numbers for zero in the whole process, from the
# moment it is loaded; and norms that leave the range of float are found by comparing with infinity.
FAST_MATH = {"-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-ffinite-math-only", "-mdaz-ftz"}
LIBRARIES = {"unix": ["m", "dl", "pthread"]}


class BuildLibrary(build_ext):
    def build_extension(self, ext):
        for command in ("compiler", "compiler_so", "linker_so"):  # with the user's CFLAGS and LDFLAGS
            words = getattr(self.compiler, command, None)
            if words is not None:
                setattr(self.compiler, command, [word for word in words if word not in FAST_MATH])
        ext.extra_compile_args = FLAGS.get(self.compiler.compiler_type, [])
        ext.libraries = LIBRARIES.get(self.compiler.compiler_type, [])
        super().build_extension(ext)

    def get_export_symbols(self, ext):
        return []

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"


class PlatformWheel(bdist_wheel):
    def run(self):
        if not self.skip_build:  # what an earlier build has left would be packed too: modules that are gone by now
            for left in (self.get_finalized_command("build").build_lib, self.bdist_dir):
                shutil.rmtree(left, ignore_errors=True)
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


source = "flatlora/ops/csrc/"
setup(
    ext_modules=[
        Extension(
            "flatlora.ops._noise",
            [source + "noise.c"],
            depends=[source + "noise_kernel.h", source + "avx512.h", "setup.py"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
