"""Row blocks of a weight and a reusable scratch buffer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

BLOCK_BYTES = 16 * 2**20
ROW_MULTIPLE = 64  # the torch backend generates noise 64 rows at a time


def row_blocks(rows: int, columns: int, itemsize: int) -> Iterator[slice]:
    """Slices that cover `rows` rows, each of at most `BLOCK_BYTES` bytes of a (rows, columns) matrix.

    A block has a multiple of 64 rows, except for the last one, and at least 64: rows are not split.
    """
    step = max(ROW_MULTIPLE, BLOCK_BYTES // max(1, columns * itemsize) // ROW_MULTIPLE * ROW_MULTIPLE)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def is_watched() -> bool:
    """Whether a torch dispatch mode is active.

    A mode sees each operator and may keep its result, as selective checkpointing does to return it in the recompute. A
    tensor that an operator has returned must then not be changed in place.
    """
    return torch._C._len_torch_dispatch_stack() > 0


def unwatched() -> AbstractContextManager[Any]:
    """Disable the dispatch modes.

    For values that are computed once and cached: they are not computed again in a recompute, where selective
    checkpointing expects the same sequence of operators.
    """
    return _disable_current_modes() if is_watched() else nullcontext()


def scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A buffer on the CPU that is reused by all calls of a thread; None where it cannot be reused.

    The system hands out new memory of this size page by page, which takes as long as generating the noise. CUDA has a
    caching allocator. The buffer is not shared
    - while gradients are recorded (a backward that is itself differentiated), since autograd keeps its operands;
    - under a dispatch mode, which may keep the result of an operator;
    - in inference mode, whose tensors cannot be used outside of it.
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
