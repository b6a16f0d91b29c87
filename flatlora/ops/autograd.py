"""Types and the call of autograd functions, which torch leaves untyped."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

Context = Any  # torch's FunctionCtx, which takes any attribute
Gradients = tuple[Tensor | None, ...]  # one for each argument of `forward`


def apply(function: type[Function], *args: object) -> Tensor:
    """``function.apply(*args)``."""
    out: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]  # torch's
    return out
