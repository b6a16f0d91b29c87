"""Options shared by the measurements along random directions, and their checks.

The options are declared in `Options`, checked when an `Options` is made, and documented there and nowhere else. A
measuring function takes them as ``**options``; `measures` puts them into its signature, so that `help` lists all
keywords with their defaults. Type checkers and editors read the same keywords from `OptionKeywords`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor

from ..utils import arguments
from ..utils.arguments import SEED, WrongType, checker, choice, integer, keywords, number, numbers, refuse, tensor

Layers = str | Callable[[str], bool] | None  # None, "all", or a function of the layer's name
Norms = Mapping[str, Tensor]  # name of a layer -> (m,)
File = str | os.PathLike[str] | None
F = TypeVar("F", bound=Callable[..., Any])

NOISES = ("filter", "filter_normalized", "layer", "plain")
OLD_SPELLINGS = {"filter_normalised": "filter_normalized"}
SPACES = ("merged", "adapter")


# ---- checks: (name, value) -> value in its plain form, or an error that names the argument ----


def check_noise(name: str, value: Any) -> str:
    """One of `NOISES`; the spelling of earlier versions is accepted and replaced."""
    if isinstance(value, str):
        value = OLD_SPELLINGS.get(value, value)
    return choice(name, value, NOISES)


def check_space(name: str, value: Any) -> str:
    """One of `SPACES`."""
    return choice(name, value, SPACES)


def check_seed(name: str, value: Any) -> int:
    """Any 64-bit integer."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return integer(name, value, *SEED, expected="an integer of 64 bits" if whole else "an integer")


def check_norms(name: str, value: Any) -> Norms | None:
    """Row norms by layer name, or None."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        refuse(name, "None or a mapping of layer names to row norms, as merged_row_norms makes", value, WrongType)
    for layer, norms in value.items():
        tensor(f"{name}[{layer!r}]", norms)
    return value


def check_level(name: str, value: Any) -> float:
    """The probability of a confidence interval."""
    return number(name, value, 0, 1, above=True, below=True, expected="in (0, 1)")


def check_progress(value: Any) -> bool | None:
    """Whether to show a progress bar; None: on a terminal."""
    return arguments.boolean("progress", value, optional=True)


def check_positive(name: str, value: Any) -> float:
    """A finite number > 0."""
    return number(name, value, 0, above=True, expected="a finite number > 0")


def strengths(name: str, values: Any) -> Tensor:
    """One or more finite strengths >= 0 as float64, (count,)."""
    return numbers(name, values, low=0)


def grid(name: str, values: Any) -> Tensor:
    """One or more finite distances as float64, (points,). A rounding error at the center of a linspace becomes 0."""
    found = numbers(name, values, expected="at least one finite number")
    return torch.where(found.abs() < 1e-6 * found.abs().max(), 0.0, found)


# ---- the shared options ----


def _option(check: Callable[..., Any], default: Any = None, **settings: Any) -> Any:
    return field(default=default, metadata={"check": checker(check, **settings)})


@dataclass(frozen=True)
class Options:
    """Options of `loss_line`, `loss_surface`, `expected_sharpness` and `under_weight_noise`.

    Attributes:
        seed: of the random directions, any 64-bit integer. The same seed gives every model the same directions, layer
            name by layer name.
        space: "merged", the weights W' = W + s B A; or "adapter", the factors A and B of the active adapters.
        layers: None, the layers with an adapter, or all layers if none has one; "all", every linear, convolution,
            embedding and attention layer; or a function of the layer's name that selects among these.
        norms: row norms by layer name that replace the model's own, from `merged_row_norms`: several models are then
            displaced by identical noise.
        sizes: weight of each batch in the mean, usually its number of examples; default: equal weights.
        progress: show a progress bar; None shows one on a terminal.
        file: journal of the measurement. Losses are appended as they are measured; if the file exists, the measurement
            is resumed from it.
    """

    seed: int = _option(check_seed, 0)
    space: str = _option(check_space, "merged")
    layers: Layers = _option(arguments.layers)
    norms: Norms | None = _option(check_norms)
    sizes: Sequence[float] | None = None  # checked against the number of batches, in `MeanLoss`
    progress: bool | None = _option(arguments.boolean, optional=True)
    file: File = _option(arguments.path, optional=True)

    def __post_init__(self) -> None:
        arguments.check_fields(self)

    @classmethod
    def of(cls, function: Callable[..., Any], given: OptionKeywords) -> Options:
        """The checked options of a call of `function`.

        Raises:
            TypeError: an unknown keyword; the message suggests similar ones.
            ValueError: an option out of bounds.
        """
        keywords(function.__name__, given, _keyword_names(function))
        return cls(**given)


class OptionKeywords(TypedDict, total=False):
    """The fields of `Options` for type checkers, which take no dataclass for ``**options``."""

    seed: int
    space: str
    layers: Layers
    norms: Norms | None
    sizes: Sequence[float] | None
    progress: bool | None
    file: File


def _keyword_names(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def measures(function: F) -> F:
    """Decorate a measuring function: its signature shows the fields of `Options` in place of ``**options``."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(Options)
    ]
    function.__dict__["__signature__"] = signature.replace(parameters=[*own, *shared])
    return function
