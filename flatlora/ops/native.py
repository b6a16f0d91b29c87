"""The C kernel of `csrc/`: found beside this file, called through ctypes (which releases the GIL).

It is built by `pip install` where there is a C compiler. `LIBRARY` is None where it was not.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # the enum of noise.c
KERNELS = ("baseline", "avx2", "avx512", "avx512bf16")  # the order of KERNELS in noise.c
SERIAL = 1 << 16  # weights (about 0.06 ms) below which waking other threads costs more than it saves


def _load() -> Any:
    path = Path(__file__).with_name("_noise.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # not built, or for another machine
        return None
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    operand: list[Any] = [pointer, integer, long, long]
    library.flatlora_perturb.argtypes = [
        *operand, *operand, pointer, pointer, long, pointer, long, long, long, integer, integer
    ]  # fmt: skip
    library.flatlora_words.argtypes = [pointer, pointer, long, long, long, pointer, long, integer]
    library.flatlora_normals.argtypes = [pointer, pointer, long, integer]
    library.flatlora_norms.argtypes = [
        pointer, pointer, integer, long, *[pointer] * 4, ctypes.c_float, *[long] * 3, integer, integer
    ]  # fmt: skip
    for name in ("perturb", "words", "normals", "norms"):
        getattr(library, f"flatlora_{name}").restype = None
    return library


# Loaded on import, not on first use: the library remembers the process it was loaded in, so that the children of a fork
# leave the thread pool of their parent alone.
LIBRARY = _load()
BEST = LIBRARY.flatlora_best() if LIBRARY is not None else 0


def perturb(
    weight: Tensor,  # (m, n)
    row_std: Tensor,  # (m,)
    key: Tensor,  # (2,) int64
    layer: int,
    out: Tensor,  # (m, n)
    *,
    first_row: int = 0,
    rows: Tensor | None = None,  # (m,) int64
    kernel: int | None = None,
) -> None:
    """Writes ``weight + row_std[:, None] * z`` into `out`, for rows `first_row`, `first_row` + 1, ..., or `rows`.

    Args:
        weight, out: on the CPU, of a dtype in `DTYPES`, any strides.
        kernel: index into `KERNELS`; default the best one that this machine can run.

    Raises:
        TypeError: a dtype that the kernel does not know.
    """
    m, n = weight.shape
    for name, tensor in (("weight", weight), ("out", out)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be of one of {list(DTYPES)} for backend 'c', got {tensor.dtype}")
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    row_std, key = row_std.to(wide).contiguous(), key.contiguous()
    if rows is not None:
        rows = rows.to(torch.int64).contiguous()
    LIBRARY.flatlora_perturb(
        out.data_ptr(), DTYPES[out.dtype], *out.stride(),
        weight.data_ptr(), DTYPES[weight.dtype], *weight.stride(),
        row_std.data_ptr(), key.data_ptr(), layer,
        None if rows is None else rows.data_ptr(), first_row,
        m, n,
        torch.get_num_threads() if m * n >= SERIAL else 1,
        BEST if kernel is None else kernel,
    )  # fmt: skip


def has_norms(weight: Tensor) -> bool:
    """Can `merged_row_norms` serve this weight?"""
    known = weight.dtype in (torch.float32, torch.bfloat16)
    return LIBRARY is not None and known and weight.device.type == "cpu" and weight.stride(1) == 1


def merged_row_norms(
    weight: Tensor,  # (m, n)
    squared: Tensor,  # (m,)
    B: Tensor,  # (m, r)
    A: Tensor,  # (r, n)
    scaling: float,
    *,
    kernel: int | None = None,
) -> Tensor:
    """`norms.merged_row_norms` in one pass over W, for a weight that `has_norms`; products in float32."""
    A, B = A.to(torch.float32).contiguous(), B.to(torch.float32).contiguous()
    gram, out = A @ A.T, torch.empty_like(squared)
    m, n = weight.shape
    LIBRARY.flatlora_norms(
        out.data_ptr(), weight.data_ptr(), DTYPES[weight.dtype], weight.stride(0), squared.data_ptr(),
        B.data_ptr(), A.data_ptr(), gram.data_ptr(), scaling, m, n, A.shape[0],
        torch.get_num_threads() if m * n >= SERIAL else 1,
        BEST if kernel is None else kernel,
    )  # fmt: skip
    return out


def words(
    rows: Tensor, columns: int, key: Tensor, layer: int, *, first_block: int = 0, kernel: int | None = None
) -> Tensor:
    """The words that the kernel makes its normals of, as `philox.words` gives them: (m, blocks, 4) int64."""
    rows, key = rows.to(torch.int64).contiguous(), key.contiguous()
    blocks = 16 * -(-columns // 64)
    out = torch.empty(len(rows), blocks, 4, dtype=torch.int32)
    LIBRARY.flatlora_words(
        out.data_ptr(), rows.data_ptr(), len(rows), first_block, blocks, key.data_ptr(), layer,
        BEST if kernel is None else kernel,
    )  # fmt: skip
    return out.to(torch.int64) & 0xFFFFFFFF


def normals(words: Tensor, *, kernel: int | None = None) -> Tensor:
    """The normals (blocks, 4) float32 that the kernel makes of words (blocks, 4) int64."""
    words = words.to(torch.int32).contiguous()
    out = torch.empty(words.shape)
    LIBRARY.flatlora_normals(out.data_ptr(), words.data_ptr(), len(words), BEST if kernel is None else kernel)
    return out
