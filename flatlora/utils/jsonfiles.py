"""JSON files that may be damaged, and are never left half-written."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn


def read(path: str | os.PathLike, way_out: str, *, strict: bool = True) -> dict[str, Any]:
    """The object in a file.

    Args:
        path: of the file.
        way_out: what to do about a damaged file, a sentence without its full stop.
        strict: refuse NaN, Infinity and a name that is there twice.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read or does not hold a JSON object; the message names it.
    """
    try:
        return loads(Path(path).read_bytes(), strict=strict)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise ValueError(f"{os.fspath(path)} cannot be used: {reason}. {way_out}.") from None


def loads(content: bytes, *, strict: bool = True) -> dict[str, Any]:
    """The JSON object in these bytes.

    Raises:
        ValueError: there is none, and why.
    """
    if not content.strip(b" \t\r\n\0"):
        raise ValueError("it is empty, as a full disk leaves a file")
    hooks: dict[str, Any] = {"object_pairs_hook": _once, "parse_constant": _refuse_constant} if strict else {}
    try:
        found = json.loads(content.decode("utf-8"), **hooks)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    except RecursionError:
        raise ValueError("it is not JSON that can be read: too deeply nested") from None
    if not isinstance(found, dict):
        raise ValueError(f"it must hold a JSON object, got {type(found).__name__}")
    return found


def write(path: str | os.PathLike, text: str) -> None:
    """Write a whole file or nothing: what was there stays until the new one is complete."""
    target = Path(os.path.realpath(path))  # a link stays a link
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is in it twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
