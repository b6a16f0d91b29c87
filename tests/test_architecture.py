"""The rooms of the package import one another in one direction, as the page "Architecture" draws it."""

import ast
from pathlib import Path

import pytest

import flatlora

PACKAGE = Path(flatlora.__file__).parent
LOWER = {  # what each room may import
    "utils": [],
    "ops": ["utils"],
    "config": ["ops", "utils"],
    "methods": ["config", "ops", "utils"],
    "training": ["methods", "config", "ops", "utils"],
    "layers": ["training", "methods", "config", "ops", "utils"],
    "api": ["layers", "training", "methods", "config", "ops", "utils"],
    "integrations": ["api", "training", "config", "utils", "analysis"],
    "analysis": ["ops", "utils"],
    "plotting": ["analysis", "utils"],
    "report": ["plotting", "analysis", "utils"],
}
# (importing module, room): calls that go up, each inside a function, each with its reason
UP = {
    ("config", "layers"): "peft calls the factory that the configuration registers",
    ("config", "methods"): "FlatLoraConfig is importable from flatlora.config",
}
LONGEST_FILE, LONGEST_FUNCTION = 500, 45  # lines


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem in LOWER]


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def is_for_types(node):
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def imports(tree, path):
    """The rooms that a module imports, without what only the type checker sees."""
    package = ["flatlora", *path.relative_to(PACKAGE).parent.parts]
    todo, found = [tree], set()
    while todo:
        node = todo.pop()
        todo += [child for child in ast.iter_child_nodes(node) if not is_for_types(child)]
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = [*base, *(node.module or "").split(".")]
            name = [part for part in name if part]
            if name == ["flatlora"]:
                found |= {alias.name for alias in node.names}
            elif name[0] == "flatlora":
                found.add(name[1])
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path):
    room = room_of(path)
    up = {target for (source, target) in UP if source == path.relative_to(PACKAGE).with_suffix("").as_posix()}
    assert imports(ast.parse(path.read_text()), path) - {room} - up <= set(LOWER[room])


def test_every_room_is_known():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert rooms - {"__pycache__", "__init__", "_moved"} == LOWER.keys()


def test_no_file_and_no_function_is_too_long():
    long = []
    for path in modules():
        text = path.read_text()
        if len(text.splitlines()) > LONGEST_FILE:
            long.append(path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = node.body[0] if ast.get_docstring(node) else None
                first = docstring.end_lineno if docstring else node.lineno
                if node.end_lineno - first > LONGEST_FUNCTION:
                    long.append(f"{path.name}::{node.name}")
    assert long == []


def test_old_module_names_are_importable():
    from flatlora import _moved

    for old, new in _moved.MOVED.items():
        assert new
        __import__(f"flatlora.{old}")
    from flatlora.layer import flat_layers
    from flatlora.state import Perturbation, Record

    from flatlora.config import FlatLoraConfig

    assert FlatLoraConfig is flatlora.FlatLoraConfig
    assert Perturbation is flatlora.Perturbation
    assert callable(flat_layers) and Record._fields
    with pytest.raises(ImportError, match="nothing"):
        from flatlora.state import nothing  # noqa: F401
