"""How a weight is cut into row blocks: W + eps never exists beyond one of them."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_BYTES = 16 * 2**20
ROW_MULTIPLE = 64  # the torch backend makes its noise 64 rows at a time


def row_blocks(rows: int, columns: int, itemsize: int) -> Iterator[slice]:
    """Slices that cover `rows`, each of at most `BLOCK_BYTES` bytes of an (rows, columns) matrix.

    A block has a multiple of 64 rows (the last one excepted), and at least 64: a row is never cut.
    """
    step = max(ROW_MULTIPLE, BLOCK_BYTES // max(1, columns * itemsize) // ROW_MULTIPLE * ROW_MULTIPLE)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
