"""Noise switched on and off: `perturbation.enabled`, and the context managers `perturbed` and `unperturbed`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch

from ..utils.arguments import boolean
from ..utils.copying import PartlyCopied
from .recompute import in_backward


class Override(NamedTuple):
    """What `perturbed` and `unperturbed` set in the thread that entered them."""

    enabled: bool = True
    forced: bool = False  # noise also outside training passes
    sample: int | None = None
    rho: float | None = None  # in place of rho_t of every adapter


NOW = ("forced_now", "enabled_now", "rho_now", "differ_now")  # plain attributes for the guards of compiled code


class Overrides(PartlyCopied):
    """Which noise the user has switched on or off, for the model and for each thread."""

    not_copied: ClassVar[frozenset[str]] = frozenset({"_by_thread", "_owner", *NOW})

    def __init__(self) -> None:
        self.switch = True  # of the model, for all threads
        self._start()

    def _start(self) -> None:
        self._by_thread: dict[int, Override] = {}
        self._owner = threading.current_thread()  # whose override compiled code has
        self._set_now()

    @property
    def enabled(self) -> bool:
        return self.switch and self.now().enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.switch = boolean("enabled", value)
        self._set_now()

    @contextmanager
    def override(self, **changes: Any) -> Iterator[None]:
        """Change the fields of this thread's `Override` inside."""
        if not self._owner.is_alive():
            self._owner = threading.current_thread()
        thread, before = threading.get_ident(), self._by_thread.get(threading.get_ident())
        self._set(thread, (before or Override())._replace(**changes))
        try:
            yield
        finally:
            self._set(thread, before)

    def now(self, thread: int | None = None) -> Override:
        """The override of this thread, or of `thread`. `enabled` includes the model's own switch."""
        found = self._by_thread.get(threading.get_ident() if thread is None else thread)
        if found is None and self._by_thread and in_backward():  # autograd has its own threads for accelerators
            found = next(reversed(self._by_thread.values()), None)
        found = found or Override()
        return found if self.switch else found._replace(enabled=False)

    def chosen_rho(self) -> float:
        """The strength that `perturbed` sets in this thread, 0 if it sets none."""
        return self.rho_now if torch.compiler.is_compiling() else self.now().rho or 0.0

    def _set(self, thread: int, value: Override | None) -> None:
        if value is None:
            self._by_thread.pop(thread, None)
        else:
            self._by_thread[thread] = value
        self._set_now()

    def _set_now(self) -> None:
        owner = self._owner.ident or 0
        now = self._by_thread.get(owner) or Override()
        self.forced_now, self.enabled_now, self.rho_now = now.forced, now.enabled and self.switch, now.rho or 0.0
        self.differ_now = any(thread != owner for thread in list(self._by_thread))
