"""Figures of curves: loss lines, sharpness, degradation, spectra and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..analysis.options import check_level
from ..utils.arguments import WrongType, boolean, mapping, real, refuse
from .style import THEMES, every, finish, first_of, look, new_figure, zero

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from flatlora.analysis import Degradation, ExpectedSharpness, LossLine, SamSharpness, SpectralDensity

CURVES = ("loss", "eval_loss", "flat_rho")
NOISE_UNITS = {
    "filter": r"noise strength $\rho$ (noise norm / row norm)",
    "filter_normalized": r"noise strength $\rho$ (noise norm / row norm)",
    "layer": r"noise strength $\rho$ (noise norm / layer norm)",
    "plain": r"noise strength $\sigma$ (standard deviation of an entry)",
}


def plot_loss_line(
    lines: Mapping[str, LossLine],
    *,
    level: float = 0.95,
    relative: bool = False,
    title: str | None = None,
    theme: str = "light",
    size: tuple[float, float] = (6.0, 3.8),
) -> Figure:
    """The loss along random directions: the mean with its interval. With one or two lines, each direction is drawn too.

    The range of the axis covers all directions. The interval of a few directions may be much wider far from the center;
    it is then clipped.

    Args:
        lines: label -> line.
        level: probability of the interval.
        relative: show the rise above each center, L(W' + t D) - L(W'), to compare shapes.
        title: above the axes.
        theme: "light" or "dark".
        size: width and height in inches.

    Raises:
        ValueError: no line, or an unknown theme.
        ImportError: matplotlib is not installed.
    """
    first = first_of("lines", lines, "LossLine")
    boolean("relative", relative)
    check_level("level", level)
    with new_figure(theme, size, title) as (figure, axes):
        for k, (label, line) in enumerate(lines.items()):
            line = line.rise() if relative else line
            x, (low, high) = line.distances.numpy(), line.interval(level)
            style = look(k, theme)
            if len(line.losses) > 1:
                axes.fill_between(x, low.numpy(), high.numpy(), color=style["color"], alpha=0.18, linewidth=0)
            for one in line.losses if len(lines) <= 2 and 1 < len(line.losses) <= 10 else ():
                axes.plot(x, one.numpy(), color=style["color"], linewidth=0.5, alpha=0.45)
            axes.plot(x, line.mean.numpy(), label=label, markevery=every(len(x)), **style)
        _hold(axes, [(line.rise() if relative else line).losses for line in lines.values()])
        unit = "standard deviation of an entry" if first.noise == "plain" else "fraction of the row norm"
        weights = "weights" if first.space == "merged" else "adapter factors"
        axes.set_xlabel(f"distance from the solution along a random direction of the {weights}\n({unit})")
        axes.set_ylabel(r"loss $-$ loss at the solution" if relative else "loss")
        finish(axes)
    return figure


def plot_sharpness(
    results: Mapping[str, ExpectedSharpness | SamSharpness],
    *,
    level: float = 0.95,
    title: str | None = None,
    theme: str = "light",
    size: tuple[float, float] = (6.0, 3.8),
) -> Figure:
    """The expected sharpness over the strength of the noise, or SAM's sharpness over its radius, with intervals.

    Args:
        results: label -> result, all of one kind.
        level, title, theme, size: see `plot_loss_line`.

    Raises:
        ValueError: no result, results of both kinds, or an unknown theme.
        ImportError: matplotlib is not installed.
    """
    first = first_of("results", results, "ExpectedSharpness", "SamSharpness")
    check_level("level", level)
    if len({type(result) for result in results.values()}) > 1:
        raise ValueError("results must all be ExpectedSharpness or all SamSharpness: the two have different scales")
    with new_figure(theme, size, title) as (figure, axes):
        for k, (label, result) in enumerate(results.items()):
            _band(axes, result.rho, result.mean, result.interval(level), label, look(k, theme))
        if hasattr(first, "noise"):
            axes.set_xlabel(NOISE_UNITS[first.noise])
            axes.set_ylabel(r"$E_\varepsilon L(W'+\varepsilon) - L(W')$")
        else:
            axes.set_xlabel(r"radius $\rho$ (norm over all displaced weights)")
            axes.set_ylabel(r"$\max_{\|\varepsilon\| \leq \rho} L(W'+\varepsilon) - L(W')$")
        zero(axes, theme)
        finish(axes)
    return figure


def plot_degradation(
    results: Mapping[str, Degradation],
    *,
    level: float = 0.95,
    title: str | None = None,
    theme: str = "light",
    size: tuple[float, float] = (6.0, 3.8),
) -> Figure:
    """A score over the strength of a disturbance, with intervals; thin lines show the undisturbed scores.

    The range of the axis covers all samples; the interval of a few samples may be clipped.

    Args:
        results: label -> result, all of one score under one disturbance.
        level, title, theme, size: see `plot_loss_line`.

    Raises:
        ValueError: no result, results of different disturbances or scores, or an unknown theme.
        ImportError: matplotlib is not installed.
    """
    first = first_of("results", results, "Degradation")
    check_level("level", level)
    kinds = {(result.disturbance, result.unit, result.score) for result in results.values()}
    if len(kinds) > 1:
        raise ValueError(f"results must be of one score under one disturbance, got {sorted(kinds)}")
    rounding = first.disturbance == "rounding"
    with new_figure(theme, size, title) as (figure, axes):
        for k, (label, result) in enumerate(results.items()):
            style = look(k, theme)
            _band(axes, result.levels, result.mean, result.interval(level), label, style)
            axes.axhline(result.center, color=style["color"], linestyle=style["linestyle"], linewidth=0.9, alpha=0.6)
        if rounding:
            axes.invert_xaxis()
            axes.set_xticks(first.levels.tolist(), [f"{bits:.0f}" for bits in first.levels.tolist()])
        _hold(axes, [result.scores for result in results.values()], [result.center for result in results.values()])
        axes.set_xlabel("bits per weight" if rounding else first.unit)
        axes.set_ylabel(first.score)
        finish(axes)
        axes.annotate(
            "thin lines: undisturbed", (1, 1.01), xycoords="axes fraction", ha="right", va="bottom",
            fontsize=8, color=THEMES[theme]["faint"],
        )  # fmt: skip
    return figure


def plot_spectrum(
    spectra: Mapping[str, SpectralDensity],
    *,
    title: str | None = None,
    theme: str = "light",
    size: tuple[float, float] = (6.0, 3.8),
) -> Figure:
    """The density of the Hessian's eigenvalues on a logarithmic scale, with a band of two standard errors.

    To compare models, compute their `spectral_density` with the same `width`, which is the width of the peaks. The axis
    ends at a tenth of the height of a single eigenvalue.

    Args:
        spectra: label -> spectral density.
        title, theme, size: see `plot_loss_line`.

    Raises:
        ValueError: no spectrum, or an unknown theme.
        ImportError: matplotlib is not installed.
    """
    first_of("spectra", spectra, "SpectralDensity")
    with new_figure(theme, size, title) as (figure, axes):
        tops = []
        for k, (label, found) in enumerate(spectra.items()):
            style = look(k, theme) | {"marker": "none", "linewidth": 1.4}
            x, mean = found.eigenvalues.numpy(), found.mean.numpy()
            error = found.stderr.nan_to_num().numpy()
            tops.append((mean.max(), 0.1 / found.size / (found.width * 2.5066)))
            axes.fill_between(
                x, (mean - 2 * error).clip(1e-300), mean + 2 * error, color=style["color"], alpha=0.18, linewidth=0
            )
            axes.plot(x, mean.clip(1e-300), label=label, **style)
        axes.set_yscale("log")
        axes.set_ylim(min(low for _, low in tops), 3 * max(top for top, _ in tops))  # down to a tenth of one eigenvalue
        axes.set_xlabel(r"eigenvalue $\lambda$ of the Hessian")
        axes.set_ylabel("density")
        finish(axes)
    return figure


def plot_training(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str | None = None,
    theme: str = "light",
    size: tuple[float, float] = (6.0, 4.6),
) -> Figure:
    """Training loss, evaluation loss (if logged) and strength of the noise over the optimizer step.

    Args:
        histories: label -> `trainer.state.log_history`: dicts with "step" and some of "loss", "eval_loss", "flat_rho".
        title, theme, size: see `plot_loss_line`.

    Raises:
        ValueError: no history, or a history without any of these curves.
        ImportError: matplotlib is not installed.
    """
    mapping("histories", histories, "a mapping of at least one label to a history")
    for label, history in histories.items():
        check_history(f"histories[{label!r}]", history)
    keys = CURVES
    curves = {label: {key: _curve(history, key) for key in keys} for label, history in histories.items()}
    for label, found in curves.items():
        if not any(x for x, _ in found.values()):
            raise ValueError(f"histories[{label!r}] must log at least one of {keys} with its step, got none")
    ramped = any(found["flat_rho"][0] for found in curves.values())
    panels: dict[str, Any] = {"nrows": 2, "sharex": True, "height_ratios": [3, 1]} if ramped else {}
    with new_figure(theme, size, title, **panels) as (figure, axes):
        top, *below = axes.flat if ramped else [axes]
        for k, (label, found) in enumerate(curves.items()):
            style = look(k, theme)
            plain = style | {"marker": "none"}
            if found["loss"][0]:
                top.plot(*found["loss"], label=label, **plain)
            if found["eval_loss"][0]:
                top.plot(*found["eval_loss"], label=f"{label}, held out", **style | {"linewidth": 0.9})
            if ramped and found["flat_rho"][0]:
                below[0].plot(*found["flat_rho"], **plain)
        top.set_ylabel("loss")
        finish(top)
        if ramped:
            below[0].set_ylabel(r"noise $\rho_t$")
            below[0].set_ylim(bottom=0)
        (below or [top])[-1].set_xlabel("optimizer step")
    return figure


def check_history(name: str, history: Any) -> None:
    """Raise a ValueError unless this is a log history: a list of dicts whose "step" and curves are numbers."""
    if not isinstance(history, Sequence) or not all(isinstance(row, Mapping) for row in history):
        refuse(name, "a list of dicts, as trainer.state.log_history is", history, WrongType)
    for k, row in enumerate(history):
        for key in ("step", *CURVES):
            if key in row:
                real(f"{name}[{k}][{key!r}]", row[key])


def _curve(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    rows = [(row["step"], row[key]) for row in history if key in row and "step" in row]
    return [x for x, _ in rows], [y for _, y in rows]


def _hold(axes: Axes, samples: Sequence[Any], more: Sequence[float] = ()) -> None:
    """Set the limits of the axis to the range of all finite samples, with a margin."""
    values = [*more, *(x for part in samples for x in part[part.isfinite()].tolist())] or [0.0]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 1e-3 * max(abs(high), 1.0)
    axes.set_ylim(low - margin, high + margin)


def _band(
    axes: Axes, x: Tensor, mean: Tensor, interval: tuple[Tensor, Tensor], label: str, style: dict[str, Any]
) -> None:
    """Draw a mean with its interval."""
    low, high = interval
    axes.fill_between(x.numpy(), low.numpy(), high.numpy(), color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(x.numpy(), mean.numpy(), label=label, markevery=every(len(x)), **style)
