"""Argument checks of the operators: shapes, dtypes, devices and memory.

The kernels read and write memory without any check of their own. A failed check raises a ValueError or TypeError with
the name of the argument, what was expected and what was given. The checks run at each call of each layer, so they are
fast: valid arguments take about two microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from ..utils import arguments
from ..utils.arguments import real, shown

INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
INT64 = frozenset({torch.int64})
MAX_ROWS = 1 << 32  # rows of a whole weight in the noise contract: the row index is a 32-bit word
MAX_COLUMNS = 1 << 34  # columns: the index of a block of four columns is a 32-bit word
MAX_LAYERS = 1 << 63  # layers are taken modulo 2^32

_not_dispatched = Tensor.__torch_dispatch__


class Matrix(Protocol):
    """A matrix that returns blocks of its rows as tensors: a tensor, or a weight that is stored in another form."""

    @property
    def shape(self) -> torch.Size: ...  # (m, n)

    @property
    def dtype(self) -> torch.dtype: ...  # of the blocks

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class WrongShape(ValueError, RuntimeError):
    """An input whose shape does not fit the weight; also a RuntimeError, which torch's own products raise."""


def is_plain(tensor: Tensor) -> bool:
    """Whether the elements of this tensor are in memory of its own.

    False for quantized, fake, distributed and sparse tensors and for tensors inside a functorch transform.
    """
    return (
        type(tensor).__torch_dispatch__ is _not_dispatched
        and tensor.layout is torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # torch.autograd.grad(..., is_grads_batched=True)
    )


def memory(name: str, tensor: Tensor) -> tuple[int, int]:
    """The address range of the elements of a tensor: of its first byte, and one past its last byte.

    Raises:
        TypeError: the tensor has no memory of its own.
        ValueError: the memory was freed, or is too small for the shape and strides.
    """
    try:
        if type(tensor).__torch_dispatch__ is _not_dispatched:
            start, size = tensor.data_ptr(), tensor.itemsize
            # a view with a negative bit, complex.conj().imag, is strided: `_span` finds the bit
            span = tensor.nbytes if tensor.is_contiguous() else _span(tensor)
            held = tensor.untyped_storage().nbytes() - tensor.storage_offset() * size
            if 0 <= span <= held and start % size == 0 and (start or not span):
                return start, start + span
    except RuntimeError:  # a layout without address, or a tensor inside a transform
        pass
    _refuse_memory(name, tensor)


def _span(tensor: Tensor) -> int:
    """Bytes from the first to the end of the last element; -1 for a tensor with a negative bit."""
    if tensor.is_neg():
        return -1
    if 0 in tensor.shape:
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * (1 + sum((length - 1) * stride for length, stride in pairs))


def _refuse_memory(name: str, tensor: Tensor) -> NoReturn:
    if not is_plain(tensor):
        what = f"{type(tensor).__name__}, {tensor.layout}"
        raise TypeError(f"{name} must be a plain strided tensor, got one without memory of its own ({what})")
    if tensor.is_neg() or tensor.data_ptr() % tensor.itemsize:
        raise ValueError(f"{name} must be aligned to its elements and have no negative bit: pass {name}.clone()")
    raise ValueError(
        f"{name} of shape {tuple(tensor.shape)} and strides {tensor.stride()} needs {_span(tensor)} bytes from element "
        f"{tensor.storage_offset()} of its storage on, which has {tensor.untyped_storage().nbytes()} bytes on "
        f"{tensor.device}: its memory was freed, or is elsewhere"
    )


def expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: Collection[torch.dtype] | None,
    device: torch.device | None,
) -> None:
    """Check shape, dtype (None: any floating-point dtype) and device (None: any device) of a tensor."""
    if (
        isinstance(tensor, Tensor)
        and tensor.shape == shape
        and (device is None or tensor.device == device)
        and (tensor.is_floating_point() if dtypes is None else tensor.dtype in dtypes)
    ):
        return
    _refuse(name, tensor, shape, dtypes, device)


def _refuse(
    name: str,
    tensor: Any,
    shape: tuple[int, ...],
    dtypes: Collection[torch.dtype] | None,
    device: torch.device | None,
) -> NoReturn:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {tuple(shape)}, got {type(tensor).__name__}")
    if not (tensor.is_floating_point() if dtypes is None else tensor.dtype in dtypes):
        wanted = "a floating-point dtype" if dtypes is None else f"one of {sorted(map(str, dtypes))}"
        raise TypeError(f"{name} must be of {wanted}, got {tensor.dtype}")
    where = "" if device is None else f" on {device}"
    raise ValueError(f"{name} must be of shape {tuple(shape)}{where}, got {tuple(tensor.shape)} on {tensor.device}")


def matrix(name: str, tensor: Any) -> tuple[int, int]:
    """The shape (m, n) of a floating-point matrix, a tensor or another `Matrix`."""
    shape, dtype = getattr(tensor, "shape", None), getattr(tensor, "dtype", None)
    if shape is None or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point matrix, got {dtype or type(tensor).__name__}")
    if len(shape) != 2 or shape[0] * shape[1] >= 1 << 60:
        raise ValueError(f"{name} must be of shape (m, n) with m n < 2^60, got {tuple(shape)}")
    m, n = shape
    return m, n


def expect_factors(B: Tensor, A: Tensor, m: int, n: int, device: torch.device | None) -> None:
    """Check the factors B (m, r) and A (r, n), of any floating-point dtype."""
    r = A.shape[0] if isinstance(A, Tensor) and A.ndim > 0 else 0
    expect("A", A, (r, n), None, device)
    expect("B", B, (m, r), None, device)


def integer(name: str, value: Any, low: int, high: int) -> int:
    """An integer in [low, high)."""
    if type(value) is int and low <= value < high:
        return value
    return arguments.integer(name, value, low, high - 1, expected=f"an integer in [{low}, {high})")


def number(name: str, value: Any) -> float:
    """A real number as a float."""
    return value if type(value) is float else real(name, value)


def floating_dtype(name: str, value: Any) -> None:
    """Check for a floating-point dtype or None."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise TypeError(f"{name} must be a floating-point dtype or None, got {shown(value)}")


def expect_columns(name: str, tensor: Tensor, n: int) -> None:
    """Check for a floating-point tensor of shape (..., n)."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {what}")
    if tensor.ndim == 0 or tensor.shape[-1] != n:
        raise WrongShape(f"{name} must be of shape (..., {n}), got {tuple(tensor.shape)}")


def check_noise(
    weight: Tensor,  # (m, n)
    row_std: Tensor,  # (m,)
    key: Tensor,  # (2,) int64
    layer: int,
    out: Tensor,  # (m, n)
    first_row: int = 0,
    rows: Tensor | None = None,  # (m,)
    first_column: int = 0,
) -> None:
    """Check the arguments of `perturb_weight`, but not their memory."""
    if not _fits(weight, row_std, key, out):
        m, n = matrix("weight", weight)
        expect("row_std", row_std, (m,), None, weight.device)
        expect("key", key, (2,), INT64, weight.device)
        expect("out", out, (m, n), None, weight.device)
    m, n = weight.shape
    if type(layer) is not int or not -MAX_LAYERS <= layer < MAX_LAYERS:
        integer("layer", layer, -MAX_LAYERS, MAX_LAYERS)
    if rows is None:
        if type(first_row) is not int or not 0 <= first_row <= MAX_ROWS - m:
            integer("first_row", first_row, 0, max(1, MAX_ROWS - m + 1))
    else:
        expect("rows", rows, (m,), INTEGERS, weight.device)
    if type(first_column) is not int or not 0 <= first_column <= MAX_COLUMNS - n:
        integer("first_column", first_column, 0, max(1, MAX_COLUMNS - n + 1))
    if n > MAX_COLUMNS or m > MAX_ROWS:
        raise ValueError(f"weight must have at most 2^32 rows and 2^34 columns, got {(m, n)}")
    if not out.is_contiguous() and overlaps_itself(out):
        raise ValueError(f"out must not overlap itself, got shape {tuple(out.shape)} and strides {out.stride()}")


def _fits(weight: Tensor, row_std: Tensor, key: Tensor, out: Tensor) -> bool:
    """All checks of shape, dtype and device in one expression, which is faster than one by one."""
    device, shape = weight.device, weight.shape
    try:
        return (
            len(shape) == 2
            and weight.is_floating_point()
            and row_std.shape == shape[:1]
            and row_std.is_floating_point()
            and row_std.device == device
            and key.shape == (2,)
            and key.dtype is torch.int64
            and key.device == device
            and out.shape == shape
            and out.is_floating_point()
            and out.device == device
        )
    except AttributeError:  # not a tensor
        return False


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a matrix share memory."""
    (m, n), (down, right) = tensor.shape, tensor.stride()
    # smallest i - i' and j - j' with i down + j right = i' down + j' right
    divisor = math.gcd(down, right)
    if divisor == 0:
        return m * n > 1
    return right // divisor < m and down // divisor < n


def check_memory(written: list[tuple[str, Tensor]], read: list[tuple[str, Tensor | None]]) -> None:
    """Check that all tensors have memory, and that a written tensor shares none with any other."""
    spans: list[tuple[int, int, str, Tensor]] = []
    for name, tensor in written:
        start, end = memory(name, tensor)
        _check_apart(spans, start, end, name, tensor)
        spans.append((start, end, name, tensor))
    for other, given in read:
        if given is not None:
            start, end = memory(other, given)
            for first, last, _, _ in spans:
                if first < end and start < last:
                    _check_apart(spans, start, end, other, given)


def _check_apart(spans: list[tuple[int, int, str, Tensor]], start: int, end: int, name: str, tensor: Tensor) -> None:
    for first, last, written, other in spans:
        if first < end and start < last and _share_memory(other, tensor):
            raise ValueError(f"{written} must not overlap {name}: give it memory of its own")


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have a byte in common; exact, also for interleaved slices."""
    starts, length = _segments(a)
    others, other_length = _segments(b)
    starts = starts.sort().values
    # segments of a that begin before a segment of b ends, minus those that end before it begins
    first_after = torch.searchsorted(starts, others + other_length)
    first_inside = torch.searchsorted(starts, others - length + 1)
    return bool((first_after > first_inside).any())


def _segments(tensor: Tensor) -> tuple[Tensor, int]:
    """Addresses of the contiguous segments of a tensor, and their common length in bytes."""
    size, length = tensor.itemsize, tensor.itemsize
    starts = torch.tensor([tensor.data_ptr()], dtype=torch.int64, device="cpu")
    for count, stride in reversed(list(zip(tensor.shape, tensor.stride(), strict=True))):
        if stride * size == length and len(starts) == 1:
            length *= count
        elif stride != 0:
            steps = torch.arange(count, dtype=torch.int64, device="cpu") * (stride * size)
            starts = (starts[:, None] + steps).flatten()
    return starts, length
