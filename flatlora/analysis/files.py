"""Results to JSON files and back, so that figures and reports need no model."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .disturbance import Degradation
from .hessian import SpectralDensity
from .landscape import LossLine, LossSurface
from .sharpness import ExpectedSharpness, SamSharpness

RESULTS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (LossLine, LossSurface, ExpectedSharpness, SamSharpness, SpectralDensity, Degradation)
}


def save(result: Any, path: str | os.PathLike) -> None:
    """Write one result.

    Raises:
        ValueError: it is not one of the results that have a file format.
    """
    kind = type(result).__name__
    if kind not in RESULTS:
        raise ValueError(f"result must be one of {sorted(RESULTS)}, got {kind}")
    values = {f.name: getattr(result, f.name) for f in fields(result)}
    content = {"result": kind, **{k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()}}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content) + "\n")


def load(path: str | os.PathLike) -> Any:
    """Read what `save` wrote; numbers come back as they were, tensors as float64.

    Raises:
        ValueError: the file holds something else.
    """
    content = json.loads(Path(path).read_text())
    kind = RESULTS.get(content.pop("result", None)) if isinstance(content, dict) else None
    if kind is None or set(content) != {f.name for f in fields(kind)}:
        raise ValueError(f"path must be a file that save() wrote, with one of {sorted(RESULTS)}, got {path}")
    return kind(**{k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in content.items()})
