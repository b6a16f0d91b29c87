"""What is in the source archive and in the wheel, built offline by the setuptools that is installed."""

import ast
import os
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import processes

ROOT = Path(__file__).parents[1]
pytestmark = [
    processes.patient,
    pytest.mark.skipif(not (ROOT / "MANIFEST.in").exists(), reason="needs the source tree"),
]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}('out')"
LEFT = shutil.ignore_patterns("*.so", "__pycache__", "build", "dist", "*.egg-info")


def build(kind, tree):
    """The one archive that is built from this tree; without a compiler, which takes no part here."""
    done = processes.run_command(
        [sys.executable, "-c", BUILD.format(kind)], cwd=tree, env={**os.environ, "CC": "no-such-compiler"}
    )
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "out").iterdir()
    return archive


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources."""
    folders = [name for name in ("flatlora", "tests", "examples", ".docs", ".ci") if (ROOT / name).exists()]
    for name in folders:
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=LEFT)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
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
    with tarfile.open(build("sdist", tree)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    places = [unpacked / "tests", unpacked / "examples"]
    here = [ROOT / place.relative_to(unpacked) for place in places]
    tests = sorted((ROOT / "tests").rglob("*.py"))
    helpers = {name for test in tests for name in imported(test) if any(found(name, place) for place in here)}
    assert {"helpers.runs", "helpers.noise", "helpers.layer_cases", "packages"} <= helpers
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
    modules = {f"flatlora/{name}" for name in files(tree / "flatlora") if name.endswith((".py", "py.typed"))}
    platform = sysconfig.get_platform()
    interpreter = f"{platform}-{sys.implementation.cache_tag}"
    for left in ("lib", f"lib.{platform}", f"lib.{interpreter}", f"bdist.{platform}/wheel"):
        for name in ("removed.py", "ops/_old.so"):
            file = tree / "build" / left / "flatlora" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("left over")
    with zipfile.ZipFile(build("wheel", tree)) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == modules
