"""Checks in front of the kernels, which read and write memory as they are told.

Every check raises a ValueError or TypeError with the argument, what was expected, and what came. They run at each call,
for each layer: a right call takes about two microseconds.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..utils.arguments import scalar, shown

INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
INT64 = frozenset({torch.int64})
ROWS = 1 << 32  # rows of a whole weight that the noise contract can tell apart
COLUMNS = 1 << 34  # columns: four to a block, whose index is a word of 32 bits
LAYERS = 1 << 63  # a layer is taken modulo 2^32

_not_dispatched = Tensor.__torch_dispatch__


class WrongShape(ValueError, RuntimeError):
    """An input that does not fit the weight; a RuntimeError too, as torch's own products raise."""


def is_plain(tensor: Tensor) -> bool:
    """Are the numbers of this tensor in memory of its own? Those of a quantized tensor, a FakeTensor, a DTensor, a
    sparse tensor, or a tensor inside of a transform are elsewhere."""
    return (
        type(tensor).__torch_dispatch__ is _not_dispatched
        and tensor.layout is torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # torch.autograd.grad(..., is_grads_batched=True)
    )


def memory(name: str, tensor: Tensor) -> tuple[int, int]:
    """The addresses between which the elements of a tensor lie: its first byte, and one past its last byte.

    Raises:
        TypeError: its numbers are not in memory of its own.
        ValueError: that memory was freed, or is too short for its shape and strides.
    """
    try:
        if type(tensor).__torch_dispatch__ is _not_dispatched:
            start, size = tensor.data_ptr(), tensor.itemsize
            # a view with a negative bit, complex.conj().imag, takes every other number
            span = tensor.nbytes if tensor.is_contiguous() else _span(tensor)
            held = tensor.untyped_storage().nbytes() - tensor.storage_offset() * size
            if 0 <= span <= held and start % size == 0 and (start or not span):
                return start, start + span
    except RuntimeError:  # of a layout, or inside of a transform, that has no address
        pass
    _refuse_memory(name, tensor)


def _span(tensor: Tensor) -> int:
    """Bytes from the first to the end of the last element; -1 where they are to be taken with another sign."""
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


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: Any, device: torch.device | None) -> None:
    """A tensor of this shape, on this device (None: on any), of one of these dtypes (None: of any floating point)."""
    if (
        isinstance(tensor, Tensor)
        and tensor.shape == shape
        and (device is None or tensor.device == device)
        and (tensor.is_floating_point() if dtypes is None else tensor.dtype in dtypes)
    ):
        return
    _refuse(name, tensor, shape, dtypes, device)


def _refuse(name: str, tensor: Any, shape: tuple[int, ...], dtypes: Any, device: torch.device | None) -> NoReturn:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {tuple(shape)}, got {type(tensor).__name__}")
    if not (tensor.is_floating_point() if dtypes is None else tensor.dtype in dtypes):
        wanted = "a floating-point dtype" if dtypes is None else f"one of {sorted(map(str, dtypes))}"
        raise TypeError(f"{name} must be of {wanted}, got {tensor.dtype}")
    where = "" if device is None else f" on {device}"
    raise ValueError(f"{name} must be of shape {tuple(shape)}{where}, got {tuple(tensor.shape)} on {tensor.device}")


def matrix(name: str, tensor: Any) -> tuple[int, int]:
    """The (m, n) of a floating-point matrix: a tensor, or anything with its shape and dtype."""
    shape, dtype = getattr(tensor, "shape", None), getattr(tensor, "dtype", None)
    if shape is None or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point matrix, got {dtype or type(tensor).__name__}")
    if len(shape) != 2 or shape[0] * shape[1] >= 1 << 60:
        raise ValueError(f"{name} must be of shape (m, n) with m n < 2^60, got {tuple(shape)}")
    return shape


def expect_factors(B: Tensor, A: Tensor, m: int, n: int, device: torch.device | None) -> None:
    """B (m, r) and A (r, n), floating point."""
    r = A.shape[0] if isinstance(A, Tensor) and A.ndim > 0 else 0
    expect("A", A, (r, n), None, device)
    expect("B", B, (m, r), None, device)


def integer(name: str, value: Any, low: int, high: int) -> int:
    """An integer in [low, high)."""
    if type(value) is not int:  # of NumPy, say
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)
        except (TypeError, RuntimeError):  # RuntimeError: of a tensor without memory
            raise TypeError(f"{name} must be an integer, got {shown(value)}") from None
    if not low <= value < high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}), got {shown(value)}")
    return value


def number(name: str, value: Any) -> float:
    """A real number as a float."""
    if type(value) is float:
        return value
    plain = scalar(value)
    try:
        if isinstance(plain, bool) or not isinstance(plain, (Real, torch.SymFloat, torch.SymInt)):
            raise TypeError
        return float(plain)
    except (TypeError, OverflowError):
        raise TypeError(f"{name} must be a real number that a float can hold, got {shown(value)}") from None


def boolean(name: str, value: Any) -> None:
    """True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def floating_dtype(name: str, value: Any) -> None:
    """A floating-point dtype or None."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise TypeError(f"{name} must be a floating-point dtype or None, got {shown(value)}")


def expect_columns(name: str, tensor: Tensor, n: int) -> None:
    """Floating point, (..., n)."""
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
) -> None:
    """What `perturb_weight` asks of its arguments, the memory of which is looked at elsewhere."""
    if not _fits(weight, row_std, key, out):
        m, n = matrix("weight", weight)
        expect("row_std", row_std, (m,), None, weight.device)
        expect("key", key, (2,), INT64, weight.device)
        expect("out", out, (m, n), None, weight.device)
    m, n = weight.shape
    if type(layer) is not int or not -LAYERS <= layer < LAYERS:
        integer("layer", layer, -LAYERS, LAYERS)
    if rows is None:
        if type(first_row) is not int or not 0 <= first_row <= ROWS - m:
            integer("first_row", first_row, 0, max(1, ROWS - m + 1))
    else:
        expect("rows", rows, (m,), INTEGERS, weight.device)
    if n > COLUMNS or m > ROWS:
        raise ValueError(f"weight must have at most 2^32 rows and 2^34 columns, got {(m, n)}")
    if not out.is_contiguous() and overlaps_itself(out):
        raise ValueError(f"out must not overlap itself, got shape {tuple(out.shape)} and strides {out.stride()}")


def _fits(weight: Tensor, row_std: Tensor, key: Tensor, out: Tensor) -> bool:
    """All at once, which is quicker than one by one."""
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
    """Do two elements of a matrix share their memory?"""
    (m, n), (down, right) = tensor.shape, tensor.stride()
    # i down + j right = i' down + j' right: the smallest i - i' and j - j' for which it holds
    divisor = math.gcd(down, right)
    if divisor == 0:
        return m * n > 1
    return right // divisor < m and down // divisor < n


def check_memory(written: list[tuple[str, Tensor]], read: list[tuple[str, Tensor | None]]) -> None:
    """All of them have memory, and what is written shares none with what is read, or written otherwise."""
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
    """Have two tensors a byte in common? Exact: they may be slices side by side."""
    starts, length = _segments(a)
    others, other_length = _segments(b)
    starts = starts.sort().values
    first_after = torch.searchsorted(starts, others + other_length)  # segments of a that begin before b's ends,
    first_inside = torch.searchsorted(starts, others - length + 1)  # less those that end before it begins
    return bool((first_after > first_inside).any())


def _segments(tensor: Tensor) -> tuple[Tensor, int]:
    """Addresses of the runs of bytes that a tensor is made of, and their length."""
    size, length = tensor.itemsize, tensor.itemsize
    starts = torch.tensor([tensor.data_ptr()], dtype=torch.int64, device="cpu")
    for count, stride in reversed(list(zip(tensor.shape, tensor.stride(), strict=True))):
        if stride * size == length and len(starts) == 1:
            length *= count
        elif stride != 0:
            steps = torch.arange(count, dtype=torch.int64, device="cpu") * (stride * size)
            starts = (starts[:, None] + steps).flatten()
    return starts, length
