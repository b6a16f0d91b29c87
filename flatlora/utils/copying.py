"""Copy and pickle objects without the attributes that belong to one process."""

from __future__ import annotations

from typing import Any, ClassVar


class PartlyCopied:
    """Base class. Copies and pickles leave out `not_copied`, and `_start` creates these attributes again."""

    not_copied: ClassVar[frozenset[str]] = frozenset()

    def _start(self) -> None:
        """Create the attributes named in `not_copied`."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self.not_copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def no_object() -> None:
    """A weak reference to nothing."""
    return None
