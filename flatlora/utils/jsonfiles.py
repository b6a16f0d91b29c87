"""Read JSON files that may be damaged, and write files atomically."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn


def read(path: str | os.PathLike[str], hint: str, *, strict: bool = True) -> dict[str, Any]:
    """Read the JSON object in a file.

    Args:
        path: of the file.
        hint: what to do about a damaged file, a sentence without its full stop.
        strict: refuse NaN, Infinity and duplicate names.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read or holds no JSON object; the message has its path.
    """
    try:
        return loads(Path(path).read_bytes(), strict=strict)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise ValueError(f"{os.fspath(path)} cannot be used: {reason}. {hint}.") from None


def loads(content: bytes, *, strict: bool = True) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        content: UTF-8 text.
        strict: see `read`.

    Raises:
        ValueError: the content is no JSON object; the message says why.
    """
    if not content.strip(b" \t\r\n\0"):
        raise ValueError("it is empty, as a full disk leaves a file")
    hooks: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _refuse_constant} if strict else {}
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


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write a file atomically: the previous content stays until the new content is complete.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))  # keeps a symbolic link
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is in it twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
