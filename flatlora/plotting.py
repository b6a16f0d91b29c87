"""One function per figure. Each takes results of `flatlora.analysis` and returns a matplotlib figure.

    figure = plot_loss_line({"LoRA": line_a, "Flat-LoRA": line_b}, theme="dark")
    figure.savefig("line.png")

Series differ in colour (Okabe and Ito's palette, told apart by the colour-blind), in line style and in marker, so that
they are readable printed in grey. Bands are 95 % Student intervals. matplotlib (the `plot` extra) is imported inside
the functions, pyplot never: no backend is chosen and no figure is left open.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flatlora.analysis import ExpectedSharpness, LossLine

THEMES = {
    "light": {"ink": "#1a1a1a", "faint": "#8a8a8a", "grid": "#e2e2e2", "paper": "#ffffff"},
    "dark": {"ink": "#ededed", "faint": "#9a9a9a", "grid": "#3a3d42", "paper": "#17191c"},
}
COLOURS = {  # Okabe and Ito 2008, in an order of alternating lightness; the dark theme's are lifted for contrast
    "light": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    "dark": ("#56b4e9", "#ff8a3d", "#2fc79a", "#e89cc5", "#f0c33c", "#8fd0f5"),
}
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
NOISE_UNITS = {
    "filter": r"noise strength $\rho$ (noise norm / row norm)",
    "filter_normalised": r"noise strength $\rho$ (noise norm / row norm)",
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
    """The loss along random directions: their mean with its interval; one or two lines show each direction too.

    Args:
        lines: label -> line.
        level: of the interval.
        relative: show the rise from each centre, L(W' + t D) - L(W'): shapes, with heights taken out.
        title: above the axes.
        theme: "light" or "dark".
        size: width and height in inches.

    Raises:
        ValueError: no line, or an unknown theme.
    """
    first = _first("lines", lines)
    with _figure(theme, size, title) as (figure, axes):
        for k, (label, line) in enumerate(lines.items()):
            line = line.rise() if relative else line
            x, (low, high) = line.distances.numpy(), line.interval(level)
            style = _style(k, theme)
            if len(line.losses) > 1:
                axes.fill_between(x, low.numpy(), high.numpy(), color=style["color"], alpha=0.18, linewidth=0)
            for one in line.losses if len(lines) <= 2 and 1 < len(line.losses) <= 10 else ():
                axes.plot(x, one.numpy(), color=style["color"], linewidth=0.5, alpha=0.45)
            axes.plot(x, line.mean.numpy(), label=label, markevery=_every(len(x)), **style)
        unit = "standard deviation of an entry" if first.noise == "plain" else "fraction of the row norm"
        weights = "weights" if first.space == "merged" else "adapter factors"
        axes.set_xlabel(f"distance from the solution along a random direction of the {weights}\n({unit})")
        axes.set_ylabel(r"loss $-$ loss at the solution" if relative else "loss")
        _finish(axes, len(lines))
    return figure


def plot_sharpness(
    results: Mapping[str, ExpectedSharpness],
    *,
    level: float = 0.95,
    title: str | None = None,
    theme: str = "light",
    size: tuple[float, float] = (6.0, 3.8),
) -> Figure:
    """The expected sharpness against the strength of the noise, with intervals.

    Args:
        results: label -> result.
        level, title, theme, size: as in `plot_loss_line`.
    """
    first = _first("results", results)
    with _figure(theme, size, title) as (figure, axes):
        for k, (label, result) in enumerate(results.items()):
            _band(axes, result.rho, result.mean, result.interval(level), label, _style(k, theme))
        axes.axhline(0, color=THEMES[theme]["faint"], linewidth=0.8)
        axes.set_xlabel(NOISE_UNITS[first.noise])
        axes.set_ylabel(r"$E_\varepsilon L(W'+\varepsilon) - L(W')$")
        _finish(axes, len(results))
    return figure


def _band(axes: Axes, x, mean, interval, label: str, style: dict[str, Any]) -> None:
    x, mean, (low, high) = x.numpy(), mean.numpy(), interval
    axes.fill_between(x, low.numpy(), high.numpy(), color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(x, mean, label=label, markevery=_every(len(x)), **style)


def _first(name: str, results: Mapping[str, Any]) -> Any:
    if not isinstance(results, Mapping) or not results:
        raise ValueError(f"{name} must be a mapping of at least one label to a result, got {results!r}")
    return next(iter(results.values()))


def _style(k: int, theme: str) -> dict[str, Any]:
    colours = COLOURS[theme]
    return {
        "color": colours[k % len(colours)],
        "linestyle": LINES[k % len(LINES)],
        "marker": MARKERS[k % len(MARKERS)],
        "markersize": 4.5,
        "markeredgecolor": THEMES[theme]["paper"],
        "markeredgewidth": 0.6,
        "linewidth": 1.8,
    }


def _every(points: int) -> int:
    """Markers at most about every tenth of the line, and on the middle point of an odd grid."""
    return max(1, points // 10)


@contextlib.contextmanager
def themed(theme: str) -> Iterator[dict[str, str]]:
    """matplotlib's settings for one figure; the user's own are back afterwards.

    Raises:
        ValueError: an unknown theme.
    """
    if theme not in THEMES:
        raise ValueError(f"theme must be one of {tuple(THEMES)}, got {theme!r}")
    import matplotlib

    colours = THEMES[theme]
    ink, paper = colours["ink"], colours["paper"]
    settings: dict[Any, Any] = {
        "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 9.5,
        "text.color": ink, "axes.labelcolor": ink, "axes.titlecolor": ink, "axes.edgecolor": colours["faint"],
        "xtick.color": colours["faint"], "ytick.color": colours["faint"],
        "xtick.labelcolor": ink, "ytick.labelcolor": ink,
        "figure.facecolor": paper, "axes.facecolor": paper, "savefig.facecolor": "auto",
        "axes.grid": True, "grid.color": colours["grid"], "grid.linewidth": 0.7, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.dpi": 160,
        "savefig.dpi": "figure", "axes.titlelocation": "left",
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield colours


@contextlib.contextmanager
def _figure(theme: str, size: tuple[float, float], title: str | None, **kw: Any) -> Iterator[tuple[Figure, Any]]:
    with themed(theme):
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(**kw)
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=11)
        yield figure, axes


def _finish(axes: Axes, series: int) -> None:
    axes.margins(x=0.02)
    if series:
        axes.legend(handlelength=3.2)
