"""The collection needs no optional package, and no test module imports another one."""

import ast
import os
import sys
from pathlib import Path

import pytest
from helpers import processes
from without_optional import OPTIONAL

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))


def imports(file):
    """The modules that a file imports, and the names that it takes from them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_module_imports_a_module_of_tests():
    found = {name for file in FILES for name in imports(file)}
    assert {"helpers.noise", "helpers.tiny"} <= found
    assert [name for name in found if any(part.startswith("test_") for part in name.split("."))] == []


@pytest.mark.slow
@processes.patient
def test_the_collection_needs_no_optional_package():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-m", "pytest", "-p", "without_optional", "--collect-only", "-q", "-rs", str(TESTS)]
    done = processes.run_command(command, cwd=TESTS.parent, env=environment)
    assert done.returncode == 0, done.stdout[-5000:]
    skipped = {name for name in OPTIONAL if f"No module named '{name}'" in done.stdout}
    # tests with datasets skip for trl, that with rouge_score for sacrebleu; matplotlib's give the extra as the reason
    assert skipped >= {*OPTIONAL} - {"datasets", "matplotlib", "rouge_score"}
