"""The mean loss of a model at displaced weights, with everything put back afterwards."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..utils import arguments, jsonfiles
from .options import real
from .weights import At, Weight, displaced

LossFn = Callable[[nn.Module, Any], Tensor]


@contextlib.contextmanager
def kept_rng() -> Iterator[None]:
    """The random states of torch (every device in use), numpy and Python are put back at the end, bit for bit."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    numpy = sys.modules.get("numpy")
    own, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(own)
        if numpy:
            numpy.random.set_state(arrays)


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and torch's fused transformer path (which reads weights past their layers) off.

    On leaving, every module's training mode, that switch and the random states are as they were.
    """
    training = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    with kept_rng():
        try:
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, mode in training.items():
                module.training = mode


class MeanLoss:
    """The weighted mean of ``loss_fn(model, batch)`` over the batches, at displaced weights.

    Each evaluation starts from the same random states, so a loss that draws random numbers draws the same ones.

    Args:
        model: read, never written.
        loss_fn: ``loss_fn(model, batch)`` gives the mean loss of the batch, a scalar.
        batches: run through once and kept as a list.
        sizes: weight of each batch in the mean, its number of examples; default equal.
        weights: that are displaced.

    Raises:
        ValueError: no batch, or `sizes` that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        weights: list[Weight],
        sizes: Sequence[float] | None = None,
    ) -> None:
        self.model = arguments.module("model", model)
        self.loss_fn = arguments.function("loss_fn", loss_fn, expected="loss_fn(model, batch)")
        with kept_rng():
            self.batches = arguments.batches("batches", batches)
        count = len(self.batches)
        expected = f"{count} positive numbers, one per batch"
        given = [1.0] * count if sizes is None else sizes
        counted = arguments.numbers("sizes", given, 0, above=True, expected=expected, count=count).tolist()
        self.shares = [size / sum(counted) for size in counted]
        self.weights = weights
        self._checked = False

    def loss(self, batch: Any) -> Tensor:
        """The loss of one batch, checked to be a scalar."""
        loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor, the mean over the batch, got {got}")
        return loss.reshape(())

    def __call__(self, at: At | None = None) -> float:
        """The mean loss, at the model's own weights or displaced by `at`."""
        with measuring(self.model), torch.no_grad():
            with displaced(self.weights, at) if at is not None else contextlib.nullcontext() as used:
                total = sum(share * self.loss(b).item() for share, b in zip(self.shares, self.batches, strict=True))
        if used is not None and not self._checked:
            self._warn_unused(used)
        return float(total)

    def _warn_unused(self, used: set[str]) -> None:
        self._checked = True
        unused = [weight.name for weight in self.weights if weight.name not in used]
        if unused:
            warnings.warn(
                f"{len(unused)} chosen layers never ran, so displacing them changes nothing: {', '.join(unused[:5])}"
                f"{' ...' if len(unused) > 5 else ''}; leave them out through layers=",
                stacklevel=4,
            )


def fingerprint(weights: list[Weight]) -> str:
    """Which weights are displaced, in a few letters."""
    return f"{len(weights)}, {zlib.crc32(' '.join(weight.name for weight in weights).encode()):08x}"


class Journal:
    """Losses by name, kept in a file if one is given, so that an interrupted measurement goes on where it stopped.

    The file holds one JSON line with the settings and one per loss. A last line that was cut short is measured again.

    Raises:
        ValueError: the file belongs to other settings.
    """

    def __init__(self, file: str | os.PathLike | None, settings: dict[str, Any]) -> None:
        self.path = None if file is None else Path(arguments.path("file", file))
        self.settings = json.loads(json.dumps(settings))
        self.losses: dict[str, float] = {}
        if self.path is None:
            return
        try:
            if self.path.exists() and self.path.stat().st_size:
                self._load()
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                jsonfiles.write(self.path, json.dumps(self.settings) + "\n")
        except OSError as error:
            raise ValueError(f"file {self.path} cannot be used: {error.strerror}. Give another file.") from error

    def _load(self) -> None:
        assert self.path is not None
        content = self.path.read_bytes()
        lines = content.split(b"\n")
        last = lines.pop()  # empty, or cut short
        try:
            found = jsonfiles.loads(lines[0] if lines else last)
            losses = dict(_loss(number, line) for number, line in enumerate(lines[1:], 2))
        except ValueError as error:
            raise ValueError(
                f"file {self.path} is no journal of a measurement: {error}. "
                "Give another file, or delete this one to start over."
            ) from None
        wrong = [key for key in self.settings | found if found.get(key) != self.settings.get(key)]
        if wrong:
            raise ValueError(
                f"file {self.path} holds another measurement, it differs in {', '.join(wrong)}: "
                "give another file, or delete this one to start over"
            )
        if last:
            jsonfiles.write(self.path, b"\n".join([*lines, b""]).decode())
        self.losses = losses

    def __call__(self, name: str, measure: Callable[[], float]) -> float:
        """The loss under this name: from the file, or measured now and written."""
        if name not in self.losses:
            self.losses[name] = measure()
            if self.path is not None:
                with self.path.open("a") as out:
                    out.write(json.dumps([name, self.losses[name]]) + "\n")
        return self.losses[name]

    def check(self, name: str, value: float) -> None:
        """Refuse a file whose `name` is not this value: it was made with another model or other data.

        Raises:
            ValueError: the two differ by more than rounding.
        """
        kept = self(name, lambda: value)
        if not (math.isclose(kept, value, rel_tol=1e-4, abs_tol=1e-9) or (math.isnan(kept) and math.isnan(value))):
            raise ValueError(
                f"file {self.path} was made with another model, other batches or other norms: its {name} is "
                f"{kept:.6g}, now it is {value:.6g}; give another file, or delete this one to start over"
            )


def _loss(number: int, line: bytes) -> tuple[str, float]:
    """A line of a journal: the name of a loss, and the loss."""
    try:
        name, value = json.loads(line.decode("utf-8"))
        return arguments.text("name", name), real("loss", value)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"line {number} must be a name and a loss, got {arguments.shown(line)}") from None


def bar(total: int, description: str, progress: bool | None):
    """A progress bar on stderr; None shows it on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, disable=None if progress is None else not progress, leave=False)
