"""Check arguments: one function for each kind of argument, which returns its plain value or raises.

    rho = number("rho", rho, low=0)

Each message has the name of the argument, the expected kind or bounds, and the value. NumPy and torch scalars are
accepted as numbers, a bool is not. Errors are `WrongType` for a value of the wrong type, ValueError for a value out of
bounds.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, TypeVar, cast, overload

import torch
from torch import Tensor, nn

INT64 = 2**63 - 1
SEED = (-(2**63), 2**64 - 1)  # bounds of a seed: any 64-bit integer, signed or unsigned
MAX_SHOWN = 120  # characters of a value in a message

Check = Callable[..., Any]  # (name, value, ...) -> plain value
T = TypeVar("T")


class WrongType(TypeError, ValueError):
    """A value of the wrong type; also a ValueError, for callers that catch only that."""


def shown(value: Any) -> str:
    """Shortened `repr` of a value, for messages."""
    try:
        text = repr(value)
    except Exception:  # an integer of more than 4300 digits, a class whose own repr fails
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else object.__repr__(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} ... {text[-MAX_SHOWN // 4 :]}"


def refuse(name: str, expected: str, value: Any, kind: type[Exception] = ValueError, hint: str = "") -> NoReturn:
    """Raise an error of this kind: `name` must be `expected`, got `value`."""
    of_type = f" of type {type(value).__name__}" if issubclass(kind, TypeError) else ""
    raise kind(f"{name} must be {expected}, got {shown(value)}{of_type}{hint}")


def scalar(value: Any) -> Any:
    """The Python number in an array or tensor without dimensions; any other value unchanged."""
    is_array = isinstance(value, Tensor) or type(value).__module__ == "numpy"
    return value.item() if is_array and value.shape == () and not getattr(value, "is_meta", False) else value


@overload
def number(
    name: str,
    value: Any,
    low: float = ...,
    high: float = ...,
    *,
    expected: str = ...,
    above: bool = ...,
    below: bool = ...,
    optional: Literal[False] = ...,
    hint: str = ...,
) -> float: ...


@overload
def number(
    name: str,
    value: Any,
    low: float = ...,
    high: float = ...,
    *,
    expected: str = ...,
    above: bool = ...,
    below: bool = ...,
    optional: bool,
    hint: str = ...,
) -> float | None: ...


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    expected: str = "a finite number",
    above: bool = False,
    below: bool = False,
    optional: bool = False,
    hint: str = "",
) -> float | None:
    """A finite real number in [low, high] as a float; `above` and `below` exclude the bound itself."""
    if value is None and optional:
        return None
    plain: Any = scalar(value)
    if isinstance(plain, bool) or not isinstance(plain, Real):
        what = "a number" if expected.startswith("finite") else expected
        refuse(name, what + (" or None" if optional and "None" not in what else ""), value, WrongType)
    plain = cast(Any, plain)  # Real has no order with float in its stubs
    inside = low <= plain <= high and not (above and plain == low) and not (below and plain == high)
    if not inside or not _is_finite(plain):
        refuse(name, expected, value, hint=hint)
    return float(plain)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def real(name: str, value: Any, expected: str = "a number") -> float:
    """Any real number that a float can hold, infinities and NaN included, as a float."""
    plain: Any = scalar(value)
    if isinstance(plain, bool) or not isinstance(plain, (Real, torch.SymFloat, torch.SymInt)):
        refuse(name, expected, value, WrongType)
    try:
        return float(cast(Any, plain))
    except OverflowError:  # an integer beyond the largest float
        refuse(name, "a number that a float can hold", value)


@overload
def integer(
    name: str, value: Any, low: int, high: int | None = ..., *, optional: Literal[False] = ..., expected: str = ...
) -> int: ...


@overload
def integer(
    name: str, value: Any, low: int, high: int | None = ..., *, optional: bool, expected: str = ...
) -> int | None: ...


def integer(
    name: str, value: Any, low: int, high: int | None = None, *, optional: bool = False, expected: str = ""
) -> int | None:
    """An integer in [low, high] as an int, or None if it is optional."""
    if value is None and optional:
        return None
    plain = scalar(value)
    whole = isinstance(plain, (Integral, torch.SymInt)) and not isinstance(plain, bool)
    if whole and low <= int(plain) <= (INT64 if high is None else high):
        return int(plain)
    if not expected and (high is not None or (whole and int(plain) > low)):
        bounds = f"in [{low}, {INT64 if high is None else high}]"
        or_none = " or None" if optional else ""
        expected = f"{'None or ' if optional else ''}{bounds}" if whole else f"an integer{or_none}"
    expected = expected or f"an integer >= {low}{' or None' if optional else ''}"
    refuse(name, expected, value, ValueError if whole else WrongType)


def numbers(
    name: str, value: Any, low: float = -math.inf, *, above: bool = False, expected: str = "", count: int | None = None
) -> Tensor:
    """One number or several (a sequence, an array, a tensor) as float64, (count,)."""
    expected = expected or "one or more finite numbers" + (f" >= {low:g}" if low > -math.inf else "")
    found = [_one_of(number, name, value, expected, x, low, above=above) for x in _items(name, value, expected)]
    if not found or count not in (None, len(found)):
        refuse(name, expected, value)
    return torch.tensor(found, dtype=torch.float64)


def integers(name: str, value: Any, low: int, high: int, *, expected: str, empty: bool = False) -> list[int]:
    """One integer or several as a list."""
    found = [_one_of(integer, name, value, expected, x, low, high) for x in _items(name, value, expected)]
    if not found and not empty:
        refuse(name, expected, value)
    return found


def _items(name: str, value: Any, expected: str) -> list[Any]:
    plain = scalar(value)
    if isinstance(plain, Tensor) and not plain.is_meta:
        return list(plain.detach().flatten().tolist())
    if type(plain).__module__ == "numpy":
        return list(plain.flatten().tolist())
    if isinstance(plain, Real):
        return [plain]
    if isinstance(plain, Sequence) and not isinstance(plain, (str, bytes, bytearray)):
        return list(plain)
    refuse(name, expected, value, WrongType)


def _one_of(check: Check, name: str, whole: Any, expected: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Check one item; the error shows all of them."""
    try:
        return check(name, value, *args, **kwargs)
    except ValueError as error:
        refuse(name, expected, whole, WrongType if isinstance(error, TypeError) else ValueError)


def choice(name: str, value: Any, choices: Sequence[str], expected: str = "") -> str:
    """One of several words."""
    if not isinstance(value, str) or value not in choices:
        kind = ValueError if isinstance(value, str) else WrongType
        refuse(name, expected or f"one of {list(choices)}", value, kind)
    return value


@overload
def boolean(name: str, value: Any, *, optional: Literal[False] = ...) -> bool: ...


@overload
def boolean(name: str, value: Any, *, optional: bool) -> bool | None: ...


def boolean(name: str, value: Any, *, optional: bool = False) -> bool | None:
    """True or False, or None if it is optional."""
    plain = scalar(value)
    if isinstance(plain, bool) or (plain is None and optional):
        return plain
    refuse(name, "True, False or None" if optional else "True or False", value, WrongType)


@overload
def text(name: str, value: Any, *, optional: Literal[False] = ..., empty: bool = ...) -> str: ...


@overload
def text(name: str, value: Any, *, optional: bool, empty: bool = ...) -> str | None: ...


def text(name: str, value: Any, *, optional: bool = False, empty: bool = True) -> str | None:
    """A string, or None if it is optional."""
    if value is None and optional:
        return None
    if not isinstance(value, str):
        refuse(name, "a string" + (" or None" if optional else ""), value, WrongType)
    if value == "" and not empty:
        refuse(name, "a string that is not empty", value)
    return value


def texts(name: str, value: Any, expected: str = "a list of strings", *, optional: bool = False) -> list[str] | None:
    """A collection of strings (not a single string) as a list, or None if it is optional."""
    if value is None and optional:
        return None
    if isinstance(value, str):
        raise WrongType(f"{name} must be {expected}, got the string {shown(value)}")
    if not isinstance(value, Collection) or isinstance(value, (Mapping, bytes, bytearray, Tensor)):
        refuse(name, expected, value, WrongType)
    if getattr(value, "shape", None) == () or not all(isinstance(item, str) for item in value):
        refuse(name, expected, value, WrongType)
    return list(value)


def path(name: str, value: Any, *, optional: bool = False) -> Any:
    """A path (str or os.PathLike), unchanged."""
    if value is None and optional:
        return None
    if not isinstance(value, (str, os.PathLike)):
        refuse(name, "a path (a string or os.PathLike)" + (" or None" if optional else ""), value, WrongType)
    plain = os.fspath(value)
    if not isinstance(plain, str) or not plain or "\0" in plain:
        refuse(name, "the path of a file or folder", value)
    return value


def function(name: str, value: Any, *, expected: str = "a function", optional: bool = False) -> Any:
    """A callable."""
    if not callable(value) and not (value is None and optional):
        refuse(name, expected + (" or None" if optional else ""), value, WrongType)
    return value


def instance(name: str, value: Any, kind: type[T] | tuple[type[T], ...], expected: str, hint: str = "") -> T:
    """An instance of a class, or of one of several."""
    if not isinstance(value, kind):
        refuse(name, expected, value, WrongType, hint)
    return value


def module(name: str, value: Any) -> nn.Module:
    """A torch module."""
    return instance(name, value, nn.Module, "a torch.nn.Module")


def batches(name: str, value: Any) -> list[Any]:
    """An iterable of at least one batch, as a list."""
    try:
        if isinstance(value, (str, bytes, bytearray, Mapping, nn.Module)):
            raise TypeError("one batch")
        iterator = iter(value)
    except TypeError:
        refuse(name, "an iterable of batches (one batch goes into a list)", value, WrongType)
    found = list(iterator)
    if not found:
        hint = " (an iterator that was already used up?)"
        raise ValueError(f"{name} must hold at least one batch, got none in {shown(value)}{hint}")
    return found


def tensor(name: str, value: Any, dims: int | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
    """A floating-point tensor of this shape, or with this number of dimensions."""
    what = "a floating-point tensor"
    expected = f"{what} of shape {shape}" if shape else what if dims is None else f"{what} of {dims} dimensions"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        refuse(name, expected, value, WrongType)
    if (dims is not None and value.ndim != dims) or (shape is not None and value.shape != shape):
        raise ValueError(f"{name} must have shape {shape or f'of {dims} dimensions'}, got {tuple(value.shape)}")
    return value


def mapping(name: str, value: Any, expected: str, *, empty: bool = False) -> Any:
    """A mapping with string keys and, unless `empty`, at least one entry."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        refuse(name, expected, value, WrongType)
    if not value and not empty:
        refuse(name, expected, value)
    return value


def layers(name: str, value: Any) -> Any:
    """A selection of layers: None, "all" or a function of the layer's name."""
    if not (value is None or (isinstance(value, str) and value == "all") or callable(value)):
        kind = ValueError if isinstance(value, str) else WrongType
        refuse(name, "None, 'all' or a function of the layer's name", value, kind)
    return value


def keywords(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Check the keywords of a call of `function`.

    Raises:
        TypeError: an unknown keyword; the message suggests similar ones.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}; did you mean {' or '.join(near)}?"
            )


# ---- checks of attributes ----


def checker(check: Check, *args: Any, **kwargs: Any) -> Callable[[str, Any], Any]:
    """A check ``(name, value) -> plain value``, for the metadata entry "check" of a dataclass field."""
    return lambda name, value: check(name, value, *args, **kwargs)


def check_fields(instance: Any) -> None:
    """Check the fields of a dataclass instance, frozen or not, and set them to their plain values."""
    for f in fields(instance):
        check = f.metadata.get("check")
        if check is not None:
            object.__setattr__(instance, f.name, check(f.name, getattr(instance, f.name)))


class _Checked:
    """Data descriptor without `__get__`: the attribute is read from the `__dict__` of the instance."""

    def __init__(self, check: Check, *args: Any, **kwargs: Any) -> None:
        self.check = checker(check, *args, **kwargs)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, owner: Any, value: Any) -> None:
        owner.__dict__[self.name] = self.check(self.name, value)


def Checked(check: Check, *args: Any, **kwargs: Any) -> Any:  # Any: the attribute has the type of its value
    """A class attribute whose values are checked when they are set."""
    return _Checked(check, *args, **kwargs)
