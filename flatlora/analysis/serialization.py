"""Save results to JSON files and load them, so that figures and reports need no model."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils import jsonfiles
from ..utils.arguments import WrongType, shown
from ..utils.arguments import path as check_path
from .disturbance import Degradation
from .hessian import SpectralDensity
from .landscape import LossLine, LossSurface
from .sharpness import ExpectedSharpness, SamSharpness

Result = LossLine | LossSurface | ExpectedSharpness | SamSharpness | SpectralDensity | Degradation
HINT = "Measure again, or take the file from a backup"
RESULTS: dict[str, type[Result]] = {
    kind.__name__: kind
    for kind in (LossLine, LossSurface, ExpectedSharpness, SamSharpness, SpectralDensity, Degradation)
}


def save(result: Result, path: str | os.PathLike[str]) -> None:
    """Save one result to a JSON file.

    Args:
        result: a `LossLine`, `LossSurface`, `ExpectedSharpness`, `SamSharpness`, `SpectralDensity` or `Degradation`.
        path: of the file. Missing folders are created.

    Raises:
        ValueError: a result of another class, or the file cannot be written.
    """
    kind = type(result).__name__
    if kind not in RESULTS:
        raise WrongType(f"result must be one of {sorted(RESULTS)}, got {kind}: {shown(result)}")
    values = {f.name: getattr(result, f.name) for f in fields(result)}
    content = {"result": kind, **{k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()}}
    target = Path(check_path("path", path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        jsonfiles.write(target, json.dumps(content) + "\n")
    except OSError as error:
        raise ValueError(f"path {path} cannot be written: {error.strerror}. Give another path.") from error


def load(path: str | os.PathLike[str]) -> Any:
    """Load a result that `save` has written. Numbers are restored exactly, tensors as float64.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or holds no result.
    """
    content = jsonfiles.read(check_path("path", path), HINT, strict=False)
    kind = result_kind(content)
    content.pop("result", None)
    if kind is None or set(content) != {f.name for f in fields(kind)}:
        raise ValueError(f"path must be a file that save() wrote, with one of {sorted(RESULTS)}, got {path}")
    try:
        return kind(**{name: _from_json(name, value) for name, value in content.items()})
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} cannot be used: {error}. {HINT}.") from None


def result_kind(content: dict[str, Any]) -> type[Result] | None:
    """The class of the result in the JSON object of a file, or None."""
    name = content.get("result")
    return RESULTS.get(name) if isinstance(name, str) else None


def _from_json(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    try:
        return torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise WrongType(f"{name} must be numbers in rows of one length, got {shown(value)}") from None
