"""The mean prediction over noise in the merged weight."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .perturbation import Perturbation

MOST_SAMPLES = 1 << 16
FIRST_SAMPLE = 2**32 - MOST_SAMPLES  # training counts from 0 and does not come here


class AveragedPrediction:
    """What `flatlora.averaged` returns."""

    def __init__(self, model: nn.Module, states: list[Perturbation], samples: int, rho: float | None, of: str) -> None:
        self.model, self.states, self.samples, self.rho, self.of = model, states, samples, rho, of

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mean over the samples, for the arguments of the model's forward, (..., classes)."""
        self._check()
        total: Tensor | None = None
        for k in range(self.samples):
            with ExitStack() as stack:
                for state in self.states:
                    rho = state.rho if self.rho is None else self.rho
                    stack.enter_context(state.override(forced=True, sample=FIRST_SAMPLE + k, rho=rho))
                logits = _logits(self.model(*args, **kwargs))
            if self.of == "probabilities" and logits.shape[-1:] == (1,):
                raise ValueError(
                    "averaged of probabilities needs two or more classes, got one logit, whose softmax is always 1: "
                    'give averaged of="logits"'
                )
            logits = logits if logits.dtype == torch.float64 else logits.float()
            part = logits.softmax(-1) if self.of == "probabilities" else logits
            total = part if total is None else total + part
        assert total is not None
        return total / self.samples

    def _check(self) -> None:
        if self.model.training:
            raise RuntimeError("averaged is for a model in evaluation mode, and this one trains: call model.eval()")
        for state in self.states:
            if not state.enabled:
                raise RuntimeError("averaged needs noise, and it is switched off here: by `unperturbed`, or `enabled`")
            rho = state.rho if self.rho is None else self.rho
            if rho == 0:
                raise RuntimeError("averaged needs noise, and the rho of the model is 0: give averaged a rho")
            layers = [layer for _, layer in state.flat_layers()]
            if all(layer.disable_adapters or layer.merged or not layer.active_flat_adapters() for layer in layers):
                raise RuntimeError(
                    "averaged needs noise, and no flat adapter is active and unmerged: enable, activate or unmerge it"
                )


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"averaged needs a model whose output is a tensor of logits or has .logits, got {type(output).__name__}"
        )
    return logits
