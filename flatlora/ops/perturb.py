"""Generate a perturbed weight W + eps, with one of several backends.

    (W + eps)_ij = W_ij + row_std_i * z(seed, sample, layer, first_row + i, first_column + j)

| backend     | noise                                                            | devices |
|-------------|------------------------------------------------------------------|---------|
| `reference` | noise contract of `philox.py`, in plain torch; slow              | any     |
| `c`         | noise contract, in one pass over W (`csrc/`)                     | CPU     |
| `triton`    | noise contract, in one kernel (`triton_kernel.py`)               | GPU     |
| `torch`     | torch's generators; another stream than that of the contract     | any     |

The stream of `torch` is a function of (seed, sample, layer, block of 64 rows, first column): a hash of these five seeds
a new generator of the weight's device for each block. It differs from the contract, and between device types, and a
part of the columns does not have the noise that it has in the whole weight.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..utils.arguments import shown
from ..utils.dtypes import accumulation_dtype
from . import native, philox
from .checks import (
    INTEGERS,
    MAX_COLUMNS,
    MAX_ROWS,
    Matrix,
    check_memory,
    check_noise,
    expect,
    floating_dtype,
    integer,
    is_plain,
    matrix,
    number,
)
from .four_bit import FourBitWeight

logger = logging.getLogger(__name__)

ScaledFactors = tuple[Tensor, Tensor, float]  # B (m, r), A (r, n) and s of an adapter s B A
MERGED_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})  # of weights whose norms "triton" computes
ROW_BLOCK = 64  # rows that share one generator in the `torch` backend


def perturb_weight(
    weight: Tensor | FourBitWeight,  # (m, n)
    row_std: Tensor,  # (m,)
    key: Tensor,  # (2,) int64
    layer: int,
    first_row: int = 0,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    out: Tensor | None = None,  # (m, n)
    relative: float | Tensor = 1.0,
    factors: ScaledFactors | None = None,
    first_column: int = 0,
) -> Tensor:
    """The perturbed weight ``W + relative * row_std[:, None] * z`` of a block of rows, or of another part of a weight.

    The sum is computed in float32 (float64 for a float64 weight) and rounded once. The weight is only read.

    Args:
        weight: (m, n) floating-point, any strides; or in 4 bits, which "triton" decodes in its kernel and the other
            backends dequantize first.
        row_std: (m,) standard deviation of each row, float32, or float64 for a float64 weight.
        key: (2,) int64 on the weight's device: the seed (with the rank mixed in) and the sample.
        layer: index of the layer in the noise stream.
        first_row: index of ``weight[0]`` in the whole weight.
        dtype: of the result; default: that of the weight.
        backend: one of `BACKENDS`, or "auto".
        out: tensor for the result, any strides; it must not overlap the weight. Its dtype is that of the result.
        relative: factor of `row_std`; a tensor of shape () on the weight's device is read when the kernel runs, so that
            a CUDA graph uses the value at replay.
        factors: ``(B, A, s)`` with B (m, r) and A (r, n): first write ``||W_i + s (B A)_i||`` into `row_std`, in the
            same pass over W. Only if `makes_norms` returns True.
        first_column: index of ``weight[:, 0]`` in the whole weight.

    Returns:
        `out`, or a new (m, n) contiguous tensor of `dtype`.

    Raises:
        TypeError, ValueError: a backend that is unknown or does not support the weight's device; arguments that do not
            fit each other; an `out` that overlaps itself or the weight.
    """
    if dtype is not None:
        floating_dtype("dtype", dtype)
    if out is None:
        matrix("weight", weight)
        out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    elif not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    elif out.shape != weight.shape or out.device != weight.device or out.dtype != (dtype or out.dtype):
        raise ValueError(
            f"out must be of shape {tuple(weight.shape)} and dtype {dtype or out.dtype} on {weight.device}, "
            f"got {tuple(out.shape)}, {out.dtype}, {out.device}"
        )
    if factors is not None and not (isinstance(factors, tuple) and len(factors) == 3):
        raise TypeError(f"factors must be a tuple (B, A, s) or None, got {shown(factors)}")
    backend = resolve_backend(backend, weight.device)
    if backend == "triton":
        _in_triton(weight, row_std, key, layer, out, relative, first_row, first_column, factors)
        return out
    if isinstance(weight, FourBitWeight):
        weight = weight.dequantize()
    if isinstance(relative, Tensor):
        expect("relative", relative, (), None, weight.device)
        relative = float(relative)
    if backend == "c":
        native.perturb(
            weight, row_std, key, layer, out,
            relative=relative, first_row=first_row, first_column=first_column, factors=factors,
        )  # fmt: skip
        return out
    if factors is not None:
        raise ValueError(f"factors must be None for backend {backend!r} on {weight.device}: ask makes_norms first")
    check_noise(weight, row_std, key, layer, out, first_row, first_column=first_column)
    if is_plain(weight) and is_plain(out):
        check_memory([("out", out)], [("weight", weight), ("row_std", row_std), ("key", key)])
    row_std = row_std if relative == 1 else row_std * number("relative", relative)
    BACKENDS[backend](weight, row_std, key, layer, first_row, first_column, out)
    return out


def _in_triton(
    weight: Tensor | FourBitWeight,
    row_std: Tensor,
    key: Tensor,
    layer: int,
    out: Tensor,
    relative: float | Tensor,
    first_row: int,
    first_column: int,
    factors: ScaledFactors | None,
) -> None:
    from . import triton_kernel  # imports triton

    where: dict[str, Any] = {"first_row": first_row, "first_column": first_column}
    if factors is None:
        triton_kernel.perturb(weight, row_std, key, layer, out, relative=relative, **where)
    else:
        triton_kernel.perturb_merged(weight, row_std, key, layer, out, factors, relative=relative, **where)


def makes_norms(weight: Matrix, backend: str) -> bool:
    """Whether `perturb_weight` can compute the row norms of W + s B A in its pass over W (its argument `factors`).

    Args:
        weight: (m, n), a tensor, a `FourBitWeight`, or a weight in another form with a `device`, whose rows are rebuilt
            as tensors.
        backend: one of `BACKENDS`, or "auto".

    Raises:
        TypeError, ValueError: `weight` is neither, or the backend does not support its device.
    """
    device = getattr(weight, "device", None)
    if not isinstance(device, torch.device):
        raise TypeError(f"weight must be a matrix on a device, of shape (m, n), got {type(weight).__name__}")
    if len(weight.shape) != 2:
        return False
    backend = resolve_backend(backend, device)
    if not isinstance(weight, Tensor):
        known = {"c": native.NORM_DTYPES, "triton": MERGED_DTYPES}.get(backend, frozenset())
        return weight.dtype in known
    if backend == "triton":
        return weight.dtype in MERGED_DTYPES and is_plain(weight)
    return backend == "c" and native.has_norms(weight)


def row_noise(
    rows: Tensor,  # (k,) int64
    row_std: Tensor,  # (k,)
    key: Tensor,  # (2,) int64
    layer: int,
    columns: int,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The noise of arbitrary rows, ``row_std[:, None] * z[rows]``, for the rows that an embedding looks up.

    Each row has the same noise as in `perturb_weight` with the same key, layer and backend.

    Args:
        rows: (k,) row indices of the whole weight, in any order, with repetitions.
        row_std: (k,) standard deviation of each of these rows, float32 or float64.
        key: (2,) int64 on the rows' device: the seed (with the rank mixed in) and the sample.
        layer: index of the layer in the noise stream.
        columns: n.
        dtype: of the result; default: that of `row_std`.
        backend: one of `BACKENDS`, or "auto".

    Returns:
        (k, n) contiguous tensor of `dtype`.

    Raises:
        TypeError, ValueError: see `perturb_weight`.
    """
    k = rows.numel() if isinstance(rows, Tensor) else 0
    expect("rows", rows, (k,), INTEGERS, None)
    expect("row_std", row_std, (k,), None, rows.device)
    floating_dtype("dtype", dtype)
    integer("columns", columns, 0, min(MAX_COLUMNS, (1 << 60) // max(1, k)) + 1)
    if rows.is_cpu and k and is_plain(rows):  # on a GPU this would synchronize
        low, high = rows.aminmax()
        integer("rows", int(low), 0, MAX_ROWS), integer("rows", int(high), 0, MAX_ROWS)
    out = torch.empty(k, columns, dtype=dtype or row_std.dtype, device=rows.device)
    zero = torch.zeros((), dtype=row_std.dtype, device=rows.device).expand(out.shape)  # W = 0, one element
    check_noise(zero, row_std, key, layer, out, rows=rows)
    rows = rows.to(torch.int64)
    ROW_BACKENDS[resolve_backend(backend, rows.device)](zero, rows, row_std, key, layer, out)
    return out


def resolve_backend(backend: str, device: torch.device) -> str:
    """Resolve "auto" to a backend for this device; any other name is checked and returned.

    Args:
        backend: one of `BACKENDS`, or "auto".
        device: of the weight.

    Returns:
        A key of `BACKENDS`. "auto" means "c" on a CPU and "triton" on a GPU if available, else "torch".

    Raises:
        ValueError: an unknown name, or a backend that does not support the device.
    """
    if not isinstance(device, torch.device):
        raise TypeError(f"device must be a torch.device, got {type(device).__name__}")
    if not isinstance(backend, str) or backend not in (*BACKENDS, "auto"):
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {shown(backend)}")
    if backend == "auto":
        return _auto(device.type)
    if backend == "c" and device.type != "cpu":
        raise ValueError(f"backend='c' serves CPU tensors only, got one on {device}: use backend='auto'")
    if backend == "c" and native.LIBRARY is None:
        raise ValueError(
            "backend='c' needs the C kernel, which was not built: install a C compiler and install flatlora again "
            "(pip install --force-reinstall --no-deps --no-cache-dir), or use backend='auto'"
        )
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend='triton' serves CUDA and ROCm tensors only, got one on {device}: use backend='auto'")
    if backend == "triton" and not _has_triton():
        raise ValueError("backend='triton' needs the triton package (pip install triton), or use backend='auto'")
    return backend


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache  # logs its choice once
def _auto(device_type: str) -> str:
    if device_type == "cpu" and native.LIBRARY is not None:
        return "c"
    if device_type == "cuda" and _has_triton():
        return "triton"
    if device_type == "meta":
        raise ValueError("a tensor on the device 'meta' has no memory: allocate it first, for instance with to_empty()")
    if device_type == "cpu":
        logger.warning(
            "flatlora's C kernel was not built (no C compiler at install time): torch's generator is used instead, "
            "which is about five times slower and has another noise stream."
        )
    return "torch"


def _add(weight: Tensor, row_std: Tensor, z: Tensor) -> Tensor:
    wide = accumulation_dtype(weight.dtype)
    return torch.addcmul(weight.to(wide), row_std[:, None].to(wide), z.to(wide))


def _reference(
    weight: Tensor, row_std: Tensor, key: Tensor, layer: int, first_row: int, first_column: int, out: Tensor
) -> None:
    seed, sample = key.tolist()
    rows = torch.arange(first_row, first_row + weight.shape[0], dtype=torch.int64, device=weight.device)
    out.copy_(_add(weight, row_std, philox.normals(seed, sample, layer, rows, weight.shape[1], first_column)))


def _reference_rows(zero: Tensor, rows: Tensor, row_std: Tensor, key: Tensor, layer: int, out: Tensor) -> None:
    seed, sample = key.tolist()
    out.copy_(row_std[:, None] * philox.normals(seed, sample, layer, rows, out.shape[1]))


def _c(
    weight: Tensor, row_std: Tensor, key: Tensor, layer: int, first_row: int, first_column: int, out: Tensor
) -> None:
    native.perturb(weight, row_std, key, layer, out, first_row=first_row, first_column=first_column)


def _c_rows(zero: Tensor, rows: Tensor, row_std: Tensor, key: Tensor, layer: int, out: Tensor) -> None:
    native.perturb(zero, row_std, key, layer, out, rows=rows)


def _triton(
    weight: Tensor, row_std: Tensor, key: Tensor, layer: int, first_row: int, first_column: int, out: Tensor
) -> None:
    from . import triton_kernel  # imports triton

    triton_kernel.perturb(weight, row_std, key, layer, out, first_row=first_row, first_column=first_column)


def _triton_rows(zero: Tensor, rows: Tensor, row_std: Tensor, key: Tensor, layer: int, out: Tensor) -> None:
    from . import triton_kernel

    triton_kernel.perturb(zero, row_std, key, layer, out, rows=rows)


def _torch(
    weight: Tensor, row_std: Tensor, key: Tensor, layer: int, first_row: int, first_column: int, out: Tensor
) -> None:
    seed, sample = key.tolist()
    m, n = weight.shape
    for start in range(first_row - first_row % ROW_BLOCK, first_row + m, ROW_BLOCK):
        z = _generator_normals(seed, sample, layer, start // ROW_BLOCK, n, weight.device, first_column)
        a, b = max(start, first_row), min(start + ROW_BLOCK, first_row + m)
        part = slice(a - first_row, b - first_row)
        out[part] = _add(weight[part], row_std[part], z[a - start : b - start])


def _torch_rows(zero: Tensor, rows: Tensor, row_std: Tensor, key: Tensor, layer: int, out: Tensor) -> None:
    seed, sample = key.tolist()
    blocks = rows // ROW_BLOCK
    for block in torch.unique(blocks).tolist():
        z = _generator_normals(seed, sample, layer, block, out.shape[1], rows.device)
        (part,) = torch.where(blocks == block)
        out[part] = (row_std[part, None] * z[rows[part] % ROW_BLOCK]).to(out.dtype)


def _generator_normals(
    seed: int, sample: int, layer: int, block: int, n: int, device: torch.device, first_column: int = 0
) -> Tensor:
    counter = (block, first_column & philox.WORD, layer & philox.WORD, sample & philox.WORD)
    low, high, _, _ = philox.philox4x32(counter, (seed & philox.WORD, (seed >> 32) & philox.WORD))
    generator = torch.Generator(device=device).manual_seed((high << 32 | low) >> 1)
    return torch.empty(ROW_BLOCK, n, dtype=torch.float32, device=device).normal_(generator=generator)


# weight, row_std, key, layer, first_row, first_column, out
Perturb = Callable[[Tensor, Tensor, Tensor, int, int, int, Tensor], None]
PerturbRows = Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor], None]  # zero, rows, row_std, key, layer, out
BACKENDS: dict[str, Perturb] = {"reference": _reference, "torch": _torch, "c": _c, "triton": _triton}
ROW_BACKENDS: dict[str, PerturbRows] = {
    "reference": _reference_rows,
    "torch": _torch_rows,
    "c": _c_rows,
    "triton": _triton_rows,
}
