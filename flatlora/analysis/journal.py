"""Journal files, from which an interrupted measurement is resumed."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils import arguments, jsonfiles
from .displacement import Weight
from .options import OLD_SPELLINGS, File


class Journal:
    """Losses by name, kept in a file if one is given.

    The first line of the file holds the settings as JSON, and each further line one loss. An incomplete last line is
    measured again.

    Args:
        file: path, or None to keep the losses in memory only.
        settings: what the losses depend on.

    Raises:
        ValueError: the file cannot be read or written, or belongs to other settings.
    """

    def __init__(self, file: File, settings: dict[str, Any]) -> None:
        self.path = None if file is None else Path(arguments.path("file", file))
        self.settings = json.loads(json.dumps(settings))
        self.losses: dict[str, float] = {}
        if self.path is None:
            return
        try:
            if self.path.exists() and self.path.stat().st_size:
                self.losses = self._load(self.path)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                jsonfiles.write(self.path, json.dumps(self.settings) + "\n")
        except OSError as error:
            raise ValueError(f"file {self.path} cannot be used: {error.strerror}. Give another file.") from error

    def _load(self, path: Path) -> dict[str, float]:
        lines = path.read_bytes().split(b"\n")
        incomplete = lines.pop()  # empty if the file ends with a newline
        try:
            found = jsonfiles.loads(lines[0] if lines else incomplete)
            losses = dict(_parse_line(number, line) for number, line in enumerate(lines[1:], 2))
        except ValueError as error:
            raise ValueError(
                f"file {path} is no journal of a measurement: {error}. "
                "Give another file, or delete this one to start over."
            ) from None
        if isinstance(found.get("noise"), str):
            found["noise"] = OLD_SPELLINGS.get(found["noise"], found["noise"])
        wrong = [key for key in self.settings | found if found.get(key) != self.settings.get(key)]
        if wrong:
            raise ValueError(
                f"file {path} holds another measurement, it differs in {', '.join(wrong)}: "
                "give another file, or delete this one to start over"
            )
        if incomplete:
            jsonfiles.write(path, b"\n".join([*lines, b""]).decode())
        return losses

    def __call__(self, name: str, measure: Callable[[], float]) -> float:
        """The loss with this name: from the file, or measured now and appended to it."""
        if name not in self.losses:
            self.losses[name] = measure()
            if self.path is not None:
                with self.path.open("a") as out:
                    out.write(json.dumps([name, self.losses[name]]) + "\n")
        return self.losses[name]

    def check(self, name: str, value: float) -> None:
        """Check that the file was made with the same model and data: its entry `name` must equal this value.

        Raises:
            ValueError: the two differ by more than rounding.
        """
        kept = self(name, lambda: value)
        if not (math.isclose(kept, value, rel_tol=1e-4, abs_tol=1e-9) or (math.isnan(kept) and math.isnan(value))):
            raise ValueError(
                f"file {self.path} was made with another model, other batches or other norms: its {name} is "
                f"{kept:.6g}, now it is {value:.6g}; give another file, or delete this one to start over"
            )


def _parse_line(number: int, line: bytes) -> tuple[str, float]:
    """The name of a loss and the loss."""
    try:
        name, value = json.loads(line.decode("utf-8"))
        return arguments.text("name", name), arguments.real("loss", value)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"line {number} must be a name and a loss, got {arguments.shown(line)}") from None


def fingerprint(weights: list[Weight]) -> str:
    """Number and checksum of the names of the displaced weights."""
    return f"{len(weights)}, {zlib.crc32(' '.join(weight.name for weight in weights).encode()):08x}"
