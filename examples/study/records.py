"""The CSV of a task: one row a run, appended when the run ends, never changed."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

KEY = ("part", "cell", "arm", "variant", "strength", "lr", "seed")  # what makes a run, in this order
ORIGIN = ("status", "error", "command", "commit", "machine", "finished", "seconds")


class Records:
    """The rows of one file.

    Args:
        path: of the CSV, made with the first row.
        outcomes: the other columns.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path, outcomes: list[str]) -> None:
        self.path, self.columns = path, [*KEY, *ORIGIN, *outcomes]
        self._drop_torn_row()
        if self._begun():
            header = path.read_text().partition("\n")[0].split(",")
            if header != self.columns:
                odd = sorted(set(header) ^ set(self.columns))
                raise ValueError(
                    f"{path} must have the columns of this version, differs in {odd}: give another --output"
                )

    def rows(self) -> list[dict[str, str]]:
        """All rows, also those that another process wrote meanwhile."""
        if not self._begun():
            return []
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))

    def append(self, row: dict[str, Any]) -> None:
        """Add a row in one write, which a kill leaves whole or undone."""
        if unknown := set(row) - set(self.columns):
            raise ValueError(f"a row must hold known columns alone, got {sorted(unknown)}")
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._begun():
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in row.items()})
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, text.getvalue().encode())
            os.fsync(file)
        finally:
            os.close(file)

    def _begun(self) -> bool:
        """Whether there is a header."""
        return self.path.exists() and self.path.stat().st_size > 0

    def _drop_torn_row(self) -> None:
        """A machine that lost its power may leave half a row."""
        content = self.path.read_bytes() if self.path.exists() else b""
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What makes a run, as it stands in the file."""
    return tuple(_cell(row[name]) for name in KEY)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"
    return " ".join(str(value).split())


def values(rows: list[dict[str, str]], column: str) -> list[float]:
    """A column as numbers; NaN where a row has none."""
    return [float(row[column] or "nan") for row in rows]
