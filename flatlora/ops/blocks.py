"""How a weight is cut into row blocks, and the one block that W + eps is made in again and again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

BLOCK_BYTES = 16 * 2**20
ROW_MULTIPLE = 64  # the torch backend makes its noise 64 rows at a time


def row_blocks(rows: int, columns: int, itemsize: int) -> Iterator[slice]:
    """Slices that cover `rows`, each of at most `BLOCK_BYTES` bytes of an (rows, columns) matrix.

    A block has a multiple of 64 rows (the last one excepted), and at least 64: a row is never cut.
    """
    step = max(ROW_MULTIPLE, BLOCK_BYTES // max(1, columns * itemsize) // ROW_MULTIPLE * ROW_MULTIPLE)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def is_watched() -> bool:
    """Does a mode see each operator? It may keep what is returned, as selective checkpointing does to give it back in
    the recompute, and then that must not be changed in place."""
    return torch._C._len_torch_dispatch_stack() > 0


def unwatched() -> AbstractContextManager[Any]:
    """No mode sees the operators inside: what is computed once and kept is not computed again in a recompute, where
    selective checkpointing counts the operators."""
    return _disable_current_modes() if is_watched() else nullcontext()


def scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A block to write into on the CPU, the same memory at each call of a thread; None where there is none to share.

    Fresh memory of this size comes from the system page by page, which costs as much as the noise. CUDA's allocator
    keeps its own. While gradients are recorded (a backward that is itself differentiated) autograd keeps what it is
    given, so nothing is shared then; nor where a mode may keep it, nor in inference mode, whose tensors are of no use
    outside of it.
    """
    if device.type != "cpu" or torch.is_grad_enabled() or torch.is_inference_mode_enabled() or is_watched():
        return None
    views = _local.__dict__.setdefault("views", {})
    found: Tensor | None = views.get((shape, dtype))
    if found is None:
        size = shape.numel() * dtype.itemsize
        if size > BLOCK_BYTES:
            return None
        buffer: Tensor | None = _local.__dict__.get("buffer")
        if buffer is None or buffer.numel() < size:
            buffer = _local.buffer = torch.empty(size, dtype=torch.uint8, device=device)
            views.clear()
        found = views[shape, dtype] = buffer[:size].view(dtype).view(shape)
    return found


_local = threading.local()
