"""Call the C kernel of `csrc/` through ctypes, which releases the GIL.

The kernel is a shared library beside this file, built by `pip install` if there is a C compiler. `LIBRARY` is None if
it was not built.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.dtypes import accumulation_dtype
from .checks import (
    INT64,
    INTEGERS,
    MAX_COLUMNS,
    MAX_LAYERS,
    MAX_ROWS,
    check_memory,
    check_noise,
    expect,
    expect_factors,
    integer,
    is_plain,
    matrix,
    number,
    overlaps_itself,
)

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # the enum of noise.c
NORM_DTYPES = frozenset({torch.float32, torch.bfloat16})  # of W, for which the kernel computes row norms
KERNELS = ("baseline", "avx2", "avx512", "avx512bf16")  # the order of KERNELS in noise.c
AVX512 = KERNELS.index("avx512")
FLOAT32 = frozenset({torch.float32})
CPU = torch.device("cpu")
ABI = 3  # flatlora_abi() of noise.c
SERIAL = 1 << 16  # below this number of weights (about 0.06 ms) starting other threads takes longer than it saves


def _load() -> Any:
    path = Path(__file__).with_name("_noise.so")
    try:
        library = ctypes.CDLL(str(path))
        if library.flatlora_abi() != ABI:
            return None
    except (OSError, AttributeError):  # not built, or built for another machine or by another version
        return None
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    operand: list[Any] = [pointer, integer, long, long]
    library.flatlora_perturb.argtypes = [
        *operand, *operand, pointer, ctypes.c_double, pointer, long, pointer, *[long] * 4,
        pointer, pointer, ctypes.c_float, long, integer, integer,
    ]  # fmt: skip
    library.flatlora_add_product.argtypes = [
        pointer, integer, long, pointer, pointer, long, long, long, integer, integer
    ]  # fmt: skip
    library.flatlora_factor.argtypes = [
        integer, pointer, integer, long, pointer, ctypes.c_float, pointer, pointer, pointer, long, long, long, integer
    ]  # fmt: skip
    library.flatlora_words.argtypes = [pointer, pointer, long, long, long, pointer, long, integer]
    library.flatlora_normals.argtypes = [pointer, pointer, long, integer]
    for name in ("perturb", "add_product", "words", "normals"):
        getattr(library, f"flatlora_{name}").restype = None
    return library


# Loaded on import, not on first use: the library records the process in which it was loaded, so that a forked child
# does not use the thread pool of its parent.
LIBRARY = _load()
BEST = LIBRARY.flatlora_best() if LIBRARY is not None else 0


def perturb(
    weight: Tensor,  # (m, n)
    norms: Tensor,  # (m,)
    key: Tensor,  # (2,) int64
    layer: int,
    out: Tensor,  # (m, n)
    *,
    relative: float = 1.0,
    first_row: int = 0,
    first_column: int = 0,
    rows: Tensor | None = None,  # (m,) int64
    factors: tuple[Tensor, Tensor, float] | None = None,  # B (m, r), A (r, n), s
    kernel: int | None = None,
) -> None:
    """Write ``weight + relative * norms[:, None] * z`` into `out`.

    Args:
        weight, out: (m, n) on the CPU, of a dtype in `DTYPES`, any strides.
        norms: (m,) float32, or float64 for a float64 weight. With `factors` it is written instead of read.
        key, layer: see `perturb_weight`.
        relative: factor of the norms.
        first_row, first_column: index of ``weight[0, 0]`` in the whole weight.
        rows: the indices of all rows, instead of the first one.
        factors: B, A and s of an adapter: first write the row norms of ``weight + s B A`` into `norms`. Only if
            `has_norms(weight)`.
        kernel: index into `KERNELS`; default: the best one that this machine supports.

    Raises:
        TypeError, ValueError: an argument of a dtype that the kernel does not support, or whose shape, device or memory
            does not fit.
    """
    check_noise(weight, norms, key, layer, out, first_row, rows, first_column)
    if weight.dtype not in DTYPES or out.dtype not in DTYPES:
        _expect_supported("weight", weight)
        _expect_supported("out", out)
    wide = accumulation_dtype(weight.dtype)
    if factors is None:
        if norms.dtype != wide or not norms.is_contiguous():
            norms = norms.to(wide).contiguous()
    elif norms.dtype != torch.float32 or not norms.is_contiguous() or not has_norms(weight):
        raise ValueError(
            "with factors, row_std is written: it must be float32 and contiguous, and the weight float32 or bfloat16 "
            f"with contiguous rows, got {norms.dtype} of stride {norms.stride()} and {weight.dtype} of strides "
            f"{weight.stride()}"
        )
    key = key.contiguous()
    if rows is not None:
        rows = rows.to(torch.int64).contiguous()
    _call(weight, norms, factors, kernel, out, relative, key, layer, rows, first_row, first_column)


def _kernel(kernel: int | None) -> int:
    return BEST if kernel is None else integer("kernel", kernel, 0, BEST + 1)


def _expect_supported(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be of one of {list(DTYPES)} for backend 'c', got {tensor.dtype}")


def has_norms(weight: Tensor) -> bool:
    """Whether the kernel can compute the row norms of a merged weight with this base weight."""
    known = weight.dtype in NORM_DTYPES
    return known and LIBRARY is not None and weight.is_cpu and is_plain(weight) and weight.stride(1) == 1


def merged_row_norms(
    weight: Tensor,  # (m, n)
    B: Tensor,  # (m, r)
    A: Tensor,  # (r, n)
    scaling: float,
    *,
    kernel: int | None = None,
) -> Tensor:
    """``||W_i + s (B A)_i||`` of each row, (m,) float32, for a weight with `has_norms(weight)`.

    Squares are summed in float32, and again in float64 if the sum is out of the range of float32.

    Raises:
        TypeError, ValueError: a weight without `has_norms`, or factors that do not fit it.
    """
    m, _ = matrix("weight", weight)
    if not has_norms(weight):
        raise ValueError(
            f"weight must be float32 or bfloat16 on the CPU with contiguous rows, got {weight.dtype} on "
            f"{weight.device} of strides {weight.stride()}"
        )
    norms = torch.empty(m, dtype=torch.float32, device="cpu")
    _call(weight, norms, (B, A, scaling), kernel)
    return norms


def _call(
    weight: Tensor,
    norms: Tensor,
    factors: tuple[Tensor, Tensor, float] | None,
    kernel: int | None,
    out: Tensor | None = None,
    relative: float = 0.0,
    key: Tensor | None = None,
    layer: int = 0,
    rows: Tensor | None = None,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """Call the kernel with tensors of checked shapes and dtypes, after checking their memory."""
    m, n = weight.shape
    B = A = None
    scaling, r = 0.0, 0
    if factors is not None:
        B, A, scaling = factors
        expect_factors(B, A, m, n, weight.device)
        B, A, r = B.to(torch.float32).contiguous(), A.to(torch.float32).contiguous(), A.shape[0]
        if A.numel() == 0:
            A = A.new_empty(1)  # an empty tensor has the address NULL, which tells the kernel to read the norms
    if factors is None:
        check_memory(
            [] if out is None else [("out", out)],
            [("weight", weight), ("row_std", norms), ("key", key), ("rows", rows)],
        )
    else:
        written = [("row_std", norms)] if out is None else [("out", out), ("row_std", norms)]
        check_memory(written, [("weight", weight), ("B", B), ("A", A), ("key", key), ("rows", rows)])
    LIBRARY.flatlora_perturb(
        *((None, 0, 0, 0) if out is None else (out.data_ptr(), DTYPES[out.dtype], *out.stride())),
        weight.data_ptr(), DTYPES[weight.dtype], *weight.stride(),
        norms.data_ptr(), number("relative", relative), None if key is None else key.data_ptr(), layer,
        None if rows is None else rows.data_ptr(), first_row, first_column, m, n,
        None if B is None else B.data_ptr(), None if A is None else A.data_ptr(), number("scaling", scaling), r,
        torch.get_num_threads() if m * n >= SERIAL else 1,
        _kernel(kernel),
    )  # fmt: skip


def has_sums(out: Tensor, *factors: Tensor) -> bool:
    """Whether `add_product` can add the product of these factors to this tensor."""
    known = out.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and LIBRARY is not None and out.is_cpu and out.is_contiguous() and all(map(is_plain, (out, *factors)))


def add_product(
    out: Tensor,  # (t, n)
    left: Tensor,  # (t, r)
    right: Tensor,  # (r, n)
    mask: Tensor | None = None,  # (t, n) bool
    keep: float = 1.0,
    *,
    kernel: int | None = None,
) -> None:
    """``out += left @ right`` for a small r: summed in float32 and rounded once to the dtype of `out`.

    It needs no temporary, whereas torch makes three passes over float32 copies of a bfloat16 `out`.

    Args:
        out: (t, n) on the CPU, of a dtype in `DTYPES`, with contiguous rows.
        left, right: (t, r) and (r, n), float32.
        mask, keep: ``out += keep * mask * (left @ right)``; only if `has_factors(out, left)`.
        kernel: see `perturb`; not used with a mask.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    t, n = matrix("out", out)
    _expect_supported("out", out)
    r = right.shape[0]
    expect("left", left, (t, r), FLOAT32, out.device)
    expect("right", right, (r, n), FLOAT32, out.device)
    if not out.is_cpu or out.stride(1) != 1 or overlaps_itself(out):
        raise ValueError(
            "out must be on the CPU, of contiguous rows that do not overlap, got strides "
            f"{out.stride()} on {out.device}"
        )
    left, right = left.contiguous(), right.contiguous()
    check_memory([("out", out)], [("left", left), ("right", right)])
    if mask is not None:
        _call_factor(2, out, mask, keep, left, right, None)
        return
    LIBRARY.flatlora_add_product(
        out.data_ptr(), DTYPES[out.dtype], out.stride(0), left.data_ptr(), right.data_ptr(), t, n, r,
        torch.get_num_threads() if t * n >= SERIAL else 1,
        _kernel(kernel),
    )  # fmt: skip


def has_factors(x: Tensor, factor: Tensor) -> bool:
    """Whether `project` and `gather` can multiply this matrix with this factor."""
    known = x.dtype in (torch.bfloat16, torch.float16) and factor.dtype == torch.float32
    return known and BEST >= AVX512 and x.is_cpu and x.is_contiguous() and is_plain(x) and is_plain(factor)


def project(x: Tensor, factor: Tensor, mask: Tensor | None = None, keep: float = 1.0) -> Tensor:
    """``x_d @ factor.T`` for a factor of few rows, summed in float32, without a float32 copy of x.

    Args:
        x: (t, n), bfloat16 or float16 on the CPU, contiguous.
        factor: (r, n) float32.
        mask, keep: dropout, ``x_d = keep * mask * x`` with a mask (t, n) of bool; None for ``x_d = x``.

    Returns:
        (t, r) float32.

    Raises:
        TypeError, ValueError: operands without `has_factors`, or that do not fit each other.
    """
    t, n = matrix("x", x)
    expect("factor", factor, (factor.shape[0], n), FLOAT32, x.device)
    out = torch.empty(t, len(factor), dtype=torch.float32, device="cpu")
    _call_factor(0, x, mask, keep, None, factor.contiguous(), out)
    return out


def gather(left: Tensor, x: Tensor, mask: Tensor | None = None, keep: float = 1.0) -> Tensor:
    """``left.T @ x_d`` for few columns of `left`, summed in float32, without a float32 copy of x.

    Args:
        left: (t, r) float32.
        x, mask, keep: see `project`.

    Returns:
        (r, n) float32.

    Raises:
        TypeError, ValueError: operands without `has_factors`, or that do not fit each other.
    """
    t, n = matrix("x", x)
    expect("left", left, (t, left.shape[-1]), FLOAT32, x.device)
    out = torch.empty(left.shape[1], n, dtype=torch.float32, device="cpu")
    _call_factor(1, x, mask, keep, None, left.contiguous(), out)
    return out


def _call_factor(
    what: int, x: Tensor, mask: Tensor | None, keep: float, left: Tensor | None, factor: Tensor, out: Tensor | None
) -> None:
    """Call the kernel with operands of checked shapes; `what` as in noise.c."""
    (t, n), r = x.shape, factor.shape[1 if what == 1 else 0]
    if not has_factors(x, factor):
        raise ValueError(
            "a product with a factor needs a contiguous bfloat16 or float16 matrix on the CPU, a float32 factor and a "
            f"processor with AVX-512, got {x.dtype} of strides {x.stride()} on {x.device} and {factor.dtype}"
        )
    if mask is not None:
        expect("mask", mask, (t, n), frozenset({torch.bool}), x.device)
        mask = mask.contiguous()
    written = [("x", x)] if out is None else [("out", out)]
    check_memory(written, [("factor", factor), ("mask", mask), ("left", left), ("x", x if out is not None else None)])
    if t * n * r == 0:
        if out is not None:
            out.zero_()
        return
    LIBRARY.flatlora_factor(
        what, x.data_ptr(), DTYPES[x.dtype], x.stride(0), _pointer(mask), number("keep", keep),
        _pointer(left), factor.data_ptr(), _pointer(out), t, n, r,
        torch.get_num_threads() if t * n >= SERIAL else 1,
    )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def words(
    rows: Tensor, columns: int, key: Tensor, layer: int, *, first_block: int = 0, kernel: int | None = None
) -> Tensor:
    """The words from which the kernel computes normals, for tests: (m, blocks, 4) int64, as `philox.words`."""
    expect("rows", rows, (rows.numel(),), INTEGERS, CPU)
    expect("key", key, (2,), INT64, CPU)
    rows, key = rows.to(torch.int64).contiguous(), key.contiguous()
    blocks = 16 * -(-integer("columns", columns, 0, MAX_COLUMNS + 1) // 64)
    out = torch.empty(len(rows), blocks, 4, dtype=torch.int32, device="cpu")
    check_memory([("out", out)], [("rows", rows), ("key", key)])
    LIBRARY.flatlora_words(
        out.data_ptr(), rows.data_ptr(), len(rows), integer("first_block", first_block, 0, MAX_ROWS), blocks,
        key.data_ptr(), integer("layer", layer, -MAX_LAYERS, MAX_LAYERS),
        _kernel(kernel),
    )  # fmt: skip
    return out.to(torch.int64) & 0xFFFFFFFF


def normals(words: Tensor, *, kernel: int | None = None) -> Tensor:
    """The normals (blocks, 4) float32 that the kernel computes from words (blocks, 4) int64, for tests."""
    expect("words", words, (words.numel() // 4, 4), INT64, CPU)
    words = words.to(torch.int32).contiguous()
    out = torch.empty(words.shape, dtype=torch.float32, device="cpu")
    check_memory([("out", out)], [("words", words)])
    LIBRARY.flatlora_normals(out.data_ptr(), words.data_ptr(), len(words), _kernel(kernel))
    return out
