"""Fill a table of losses, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def progress_bar(total: int, description: str, progress: bool | None) -> Any:  # Any: tqdm has no types
    """A progress bar on stderr; with None it is shown only on a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, disable=None if progress is None else not progress, leave=False)


def fill_table(
    rows: Iterable[Callable[[T], float]],
    columns: Sequence[T],
    *,
    count: int,
    description: str,
    progress: bool | None,
) -> Tensor:
    """``row(column)`` for every row and column, (count, columns) float64.

    Args:
        rows: measuring functions. They are requested one at a time, so a generator can prepare each of them.
        columns: their arguments.
        count: number of rows.
        description: of the progress bar.
        progress: see `progress_bar`.
    """
    table = torch.empty(count, len(columns), dtype=torch.float64)
    with progress_bar(table.numel(), description, progress) as bar:
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                table[i, j] = row(column)
                bar.update()
    return table
