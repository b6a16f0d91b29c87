"""Mean loss of a model at displaced weights; model, gradients and random states are left unchanged."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..utils import arguments
from ..utils.random_states import preserved_rng
from .displacement import At, Weight, displaced

LossFn = Callable[[nn.Module, Any], Tensor]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with torch's fused transformer path off, since it reads weights without calling their layers.

    Compiled models run without their compiled code, which knows nothing of displaced layers. On exit the training mode
    of every module, these switches and the random states are restored.
    """
    training = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    # without its compiler imported, which takes seconds, torch has compiled nothing
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with preserved_rng(), eager:
        try:
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, mode in training.items():
                module.training = mode


class MeanLoss:
    """Weighted mean of ``loss_fn(model, batch)`` over batches, at displaced weights.

    Each evaluation starts from the same random states, so a loss that draws random numbers draws the same ones.

    Args:
        model: read, never written.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch, a scalar tensor.
        batches: iterated once and kept as a list.
        weights: the weights to displace.
        sizes: weight of each batch in the mean, usually its number of examples; default: equal weights.

    Raises:
        ValueError: no batch, or `sizes` of another length.
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
        with preserved_rng():
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
        """The mean loss at the model's own weights, or displaced by `at`."""
        move = contextlib.nullcontext() if at is None else displaced(self.weights, at)
        with evaluation_mode(self.model), torch.no_grad(), move as used:
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
