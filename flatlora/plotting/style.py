"""Themes, styles of series, and the creation of figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..utils.arguments import choice, instance, mapping, numbers, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THEMES = {
    "light": {"ink": "#1a1a1a", "faint": "#8a8a8a", "grid": "#e2e2e2", "paper": "#ffffff"},
    "dark": {"ink": "#ededed", "faint": "#9a9a9a", "grid": "#3a3d42", "paper": "#17191c"},
}
COLORS = {  # after Okabe and Ito 2008; the first three differ in lightness, and so in grayscale too
    "light": ("#004488", "#b84a00", "#18a482", "#cc79a7", "#e69f00", "#56b4e9"),
    "dark": ("#4a90d9", "#ff9a52", "#b5f2d3", "#e89cc5", "#f0c33c", "#8fd0f5"),
}
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")


def first_of(name: str, results: Mapping[str, Any], *kinds: str) -> Any:
    """The first of the results, after a check that all of them are of these classes of `flatlora.analysis`."""
    from .. import analysis

    mapping(name, results, "a mapping of at least one label to a result")
    for label, result in results.items():
        classes = tuple(getattr(analysis, kind) for kind in kinds)
        instance(f"{name}[{label!r}]", result, classes, f"a result of {' or '.join(kinds)}")
    return next(iter(results.values()))


def look(k: int, theme: str) -> dict[str, Any]:
    """Line style of series number k, as keywords of `Axes.plot`."""
    colors = COLORS[theme]
    return {
        "color": colors[k % len(colors)],
        "linestyle": LINES[k % len(LINES)],
        "marker": MARKERS[k % len(MARKERS)],
        "markersize": 4.5,
        "markeredgecolor": THEMES[theme]["paper"],
        "markeredgewidth": 0.6,
        "linewidth": 1.8,
    }


def every(points: int) -> int:
    """Distance of markers: about ten on a line, one of them at the center of a symmetric grid."""
    return max(1, points // 10)


@contextlib.contextmanager
def themed(theme: str) -> Iterator[dict[str, str]]:
    """Set the matplotlib settings of a theme, and restore those of the user on exit.

    Yields:
        The colors of the theme.

    Raises:
        ValueError: an unknown theme.
        ImportError: matplotlib is not installed.
    """
    choice("theme", theme, tuple(THEMES))
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"figures need matplotlib: pip install 'flatlora[plot]' ({error})") from error

    colors = THEMES[theme]
    ink, paper = colors["ink"], colors["paper"]
    settings: dict[Any, Any] = {
        "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 9.5,
        "text.color": ink, "axes.labelcolor": ink, "axes.titlecolor": ink, "axes.edgecolor": colors["faint"],
        "xtick.color": colors["faint"], "ytick.color": colors["faint"],
        "xtick.labelcolor": ink, "ytick.labelcolor": ink,
        "figure.facecolor": paper, "axes.facecolor": paper, "savefig.facecolor": "auto",
        "axes.grid": True, "grid.color": colors["grid"], "grid.linewidth": 0.7, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.dpi": 160,
        "savefig.dpi": "figure", "axes.titlelocation": "left",
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield colors


@contextlib.contextmanager
def new_figure(theme: str, size: tuple[float, float], title: str | None, **kw: Any) -> Iterator[tuple[Figure, Any]]:
    """Make a figure and its axes inside a theme.

    Args:
        theme: key of `THEMES`.
        size: width and height in inches.
        title: of the figure.
        kw: arguments of `Figure.subplots`.

    Yields:
        The figure, and its axes as `Figure.subplots` returns them.

    Raises:
        ValueError: an unknown theme, or a size or title that is not one.
        ImportError: matplotlib is not installed.
    """
    text("title", title, optional=True)
    size = tuple(numbers("size", size, 0, above=True, expected="a width and a height in inches, > 0", count=2).tolist())
    with themed(theme):
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(**kw)
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=11)
        yield figure, axes


def zero(axes: Axes, theme: str) -> None:
    """Draw a line at zero."""
    axes.axhline(0, color=THEMES[theme]["faint"], linewidth=0.8, zorder=0.5)


def finish(axes: Axes) -> None:
    """Set the margins and draw the legend."""
    axes.margins(x=0.02)
    axes.legend(handlelength=3.2)
