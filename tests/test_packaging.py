"""The source archive and the wheel: contents, tag, metadata; built offline by the installed setuptools."""

import ast
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from helpers import processes

import flatlora

ROOT = Path(__file__).parents[1]
pytestmark = [
    processes.patient,
    pytest.mark.skipif(not (ROOT / "flatlora" / "ops" / "csrc").exists(), reason="needs the source tree"),
]
CC = shutil.which("gcc") or shutil.which("clang")
# An isolated build has no torch, and the build commands must not need one.
BUILD = """
import sys
sys.modules["torch"] = None
from setuptools import build_meta
build_meta.build_{}("out")
assert "flatlora" not in sys.modules, "the build imports the package"
"""
LEFT = shutil.ignore_patterns("*.so", "__pycache__", "build", "dist", "*.egg-info")


def build(kind, tree, compiler="no-such-compiler"):
    """Build the only archive of this tree; without a compiler unless the test needs one."""
    done = processes.run_command(
        [sys.executable, "-c", BUILD.format(kind)], cwd=tree, env={**os.environ, "CC": compiler}
    )
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "out").iterdir()
    return archive


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources."""
    folders = ("flatlora", "tests", "examples", ".docs", ".ci", ".github")
    for name in folders:
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=LEFT)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    return tmp_path / "tree"


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_source_archive_is_the_tree_without_what_was_made_in_it(tree):
    expected = files(tree)
    for made in ("tests/__pycache__/tiny.cpython-311.pyc", "flatlora/ops/_noise.so", "build/lib/flatlora/gone.py"):
        (tree / made).parent.mkdir(parents=True, exist_ok=True)
        (tree / made).write_bytes(b"")
    with tarfile.open(build("sdist", tree)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    added = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("flatlora.egg-info/")}
    assert names - added == expected


def test_whatever_a_test_imports_from_beside_it_is_in_the_source_archive(tree, tmp_path):
    unpack(build("sdist", tree), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    places = [unpacked / "tests", unpacked / "examples"]
    here = [ROOT / place.relative_to(unpacked) for place in places]
    tests = sorted((ROOT / "tests").rglob("*.py"))
    helpers = {name for test in tests for name in imported(test) if any(found(name, place) for place in here)}
    assert {"helpers.runs", "helpers.noise", "helpers.layer_cases", "common.data"} <= helpers
    assert [name for name in helpers if not any(found(name, place) for place in places)] == []
    assert files(unpacked / "tests") >= {test.relative_to(ROOT / "tests").as_posix() for test in tests}


def imported(file):
    """The modules that a file imports, as it names them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def found(module, place):
    return (place / (module.replace(".", "/") + ".py")).exists()


def test_a_wheel_holds_the_package_and_nothing_of_earlier_builds(tree):
    modules = package_files(tree)
    platform = sysconfig.get_platform()
    interpreter = f"{platform}-{sys.implementation.cache_tag}"
    for left in ("lib", f"lib.{platform}", f"lib.{interpreter}", f"bdist.{platform}/wheel"):
        for name in ("removed.py", "ops/_old.so"):
            file = tree / "build" / left / "flatlora" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("left over")
    assert packed(build("wheel", tree)) == modules


def unpack(file, folder):
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python before 3.11.4 has no filters
    with tarfile.open(file) as archive:
        archive.extractall(folder, **options)


def package_files(tree):
    """The files of a wheel without a kernel: no C sources, no build commands."""
    names = {name for name in files(tree / "flatlora") if name.endswith((".py", "py.typed"))}
    return {f"flatlora/{name}" for name in names if not name.startswith("ops/csrc/")}


def packed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.mark.skipif(CC is None, reason="needs a C compiler")
def test_the_source_archive_builds_the_same_wheel_as_the_tree_kernel_included(tree, tmp_path):
    expected = package_files(tree) | {"flatlora/ops/_noise.so"}
    unpack(build("sdist", tree), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", unpacked, compiler=CC)
    assert packed(wheel) == expected
    assert re.fullmatch(r"flatlora-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)


def test_version_links_and_python_versions_in_the_metadata(tree):
    with zipfile.ZipFile(build("wheel", tree)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Version"] == flatlora.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    supported = {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)}
    assert supported <= set(metadata.get_all("Classifier"))
    links = dict(link.split(", ") for link in metadata.get_all("Project-URL"))
    assert links.keys() == {"Homepage", "Repository", "Issues", "Changelog"}
    assert all(link.startswith("https://github.com/flatlora/flatlora") for link in links.values())
    page = links["Changelog"].partition("/blob/main/")[2]
    assert f"## [{flatlora.__version__}]" in (tree / page).read_text()


def test_the_version_is_written_once(tree):
    assert flatlora.__version__ not in (tree / "pyproject.toml").read_text()
    written = [
        name
        for name in files(tree / "flatlora")
        if name.endswith(".py") and f'"{flatlora.__version__}"' in (tree / "flatlora" / name).read_text()
    ]
    assert written == ["__init__.py"]
