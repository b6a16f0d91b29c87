"""One function per figure. Each takes results of `flatlora.analysis` and returns a matplotlib figure.

    figure = plot_loss_line({"LoRA": line_a, "Flat-LoRA": line_b}, theme="dark")
    figure.savefig("line.png")

Series differ in colour (Okabe and Ito's palette, told apart by the colour-blind), in line style and in marker, so that
they are readable printed in grey. Bands are 95 % Student intervals. matplotlib (the `plot` extra) is imported inside
the functions, pyplot never: no backend is chosen and no figure is left open.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flatlora.analysis import Degradation, ExpectedSharpness, LossLine, LossSurface, SamSharpness, SpectralDensity

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
        _finish(axes)
    return figure


def plot_sharpness(
    results: Mapping[str, ExpectedSharpness | SamSharpness],
    *,
    level: float = 0.95,
    title: str | None = None,
    theme: str = "light",
    size: tuple[float, float] = (6.0, 3.8),
) -> Figure:
    """The expected sharpness against the strength of the noise, or SAM's against its radius, with intervals.

    Args:
        results: label -> result, all of one kind.
        level, title, theme, size: as in `plot_loss_line`.
    """
    first = _first("results", results)
    if len({type(result) for result in results.values()}) > 1:
        raise ValueError("results must all be ExpectedSharpness or all SamSharpness: the two have different scales")
    with _figure(theme, size, title) as (figure, axes):
        for k, (label, result) in enumerate(results.items()):
            _band(axes, result.rho, result.mean, result.interval(level), label, _style(k, theme))
        if hasattr(first, "noise"):
            axes.set_xlabel(NOISE_UNITS[first.noise])
            axes.set_ylabel(r"$E_\varepsilon L(W'+\varepsilon) - L(W')$")
        else:
            axes.set_xlabel(r"radius $\rho$ (norm over all displaced weights)")
            axes.set_ylabel(r"$\max_{\|\varepsilon\| \leq \rho} L(W'+\varepsilon) - L(W')$")
        _zero(axes, theme)
        _finish(axes)
    return figure


def plot_degradation(
    results: Mapping[str, Degradation],
    *,
    score: str = "loss",
    level: float = 0.95,
    title: str | None = None,
    theme: str = "light",
    size: tuple[float, float] = (6.0, 3.8),
) -> Figure:
    """A score against the strength of a disturbance, with intervals; the undisturbed score is a mark at the left edge.

    Args:
        results: label -> result, all under one disturbance.
        score: what the score is, for the axis.
        level, title, theme, size: as in `plot_loss_line`.
    """
    first = _first("results", results)
    kinds = {(result.disturbance, result.unit) for result in results.values()}
    if len(kinds) > 1:
        raise ValueError(f"results must be under one disturbance, got {sorted(kinds)}")
    rounding = first.disturbance == "rounding"
    with _figure(theme, size, title) as (figure, axes):
        for k, (label, result) in enumerate(results.items()):
            style = _style(k, theme)
            _band(axes, result.levels, result.mean, result.interval(level), label, style)
            axes.axhline(result.center, color=style["color"], linestyle=style["linestyle"], linewidth=0.9, alpha=0.6)
        if rounding:
            axes.invert_xaxis()
            axes.set_xticks(first.levels.tolist(), [f"{bits:.0f}" for bits in first.levels.tolist()])
        axes.set_xlabel("bits per weight" if rounding else first.unit)
        axes.set_ylabel(score)
        _finish(axes)
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

    Args:
        spectra: label -> spectral density.
        title, theme, size: as in `plot_loss_line`.
    """
    _first("spectra", spectra)
    with _figure(theme, size, title) as (figure, axes):
        tops = []
        for k, (label, found) in enumerate(spectra.items()):
            style = _style(k, theme) | {"marker": "none", "linewidth": 1.4}
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
        _finish(axes)
    return figure


def plot_training(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str | None = None,
    theme: str = "light",
    size: tuple[float, float] = (6.0, 4.6),
) -> Figure:
    """Training loss, evaluation loss where there is one, and the strength of the noise, against the step.

    Args:
        histories: label -> `trainer.state.log_history`: dicts with "step" and some of "loss", "eval_loss", "flat_rho".
        title, theme, size: as in `plot_loss_line`.

    Raises:
        ValueError: a history without any of these.
    """
    _first("histories", histories)
    keys = ("loss", "eval_loss", "flat_rho")
    curves = {label: {key: _curve(history, key) for key in keys} for label, history in histories.items()}
    for label, found in curves.items():
        if not any(x for x, _ in found.values()):
            raise ValueError(f"histories[{label!r}] must log at least one of {keys} with its step, got none")
    ramped = any(found["flat_rho"][0] for found in curves.values())
    with _figure(theme, size, title, nrows=2 if ramped else 1, sharex=True, height_ratios=[3, 1][: 1 + ramped]) as (
        figure,
        axes,
    ):
        top, *below = axes.flat if ramped else [axes]
        for k, (label, found) in enumerate(curves.items()):
            style = _style(k, theme)
            plain = style | {"marker": "none"}
            if found["loss"][0]:
                top.plot(*found["loss"], label=label, **plain)
            if found["eval_loss"][0]:
                top.plot(*found["eval_loss"], label=f"{label}, held out", **style | {"linewidth": 0.9})
            if ramped and found["flat_rho"][0]:
                below[0].plot(*found["flat_rho"], **plain)
        top.set_ylabel("loss")
        _finish(top)
        if ramped:
            below[0].set_ylabel(r"noise $\rho_t$")
            below[0].set_ylim(bottom=0)
        (below or [top])[-1].set_xlabel("optimizer step")
    return figure


def _curve(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    rows = [(row["step"], row[key]) for row in history if key in row and "step" in row]
    return [x for x, _ in rows], [y for _, y in rows]


def plot_surface(
    surfaces: Mapping[str, LossSurface],
    *,
    kind: str = "contour",
    title: str | None = None,
    theme: str = "light",
    size: tuple[float, float] | None = None,
) -> Figure:
    """Loss surfaces beside each other on one scale, as filled contours or in three dimensions.

    Colours run from dark to light with the loss (cividis, readable by the colour-blind and in grey); levels are
    spaced so that each holds about as much of the plane, because a loss rises steeply.

    Args:
        surfaces: label -> surface.
        kind: "contour" or "3d".
        title, theme: as in `plot_loss_line`.
        size: width and height in inches; default 3.4 x 3.2 for each.

    Raises:
        ValueError: an unknown kind, or a surface of less than two points a side.
    """
    _first("surfaces", surfaces)
    if kind not in ("contour", "3d"):
        raise ValueError(f"kind must be 'contour' or '3d', got {kind!r}")
    for label, surface in surfaces.items():
        if min(surface.losses.shape) < 2:
            raise ValueError(f"surfaces[{label!r}] must have at least 2 x 2 points, got {tuple(surface.losses.shape)}")
    flat = kind == "contour"
    extra = {"sharex": True, "sharey": True} if flat else {"subplot_kw": {"projection": "3d"}}
    with _figure(
        theme, size or (3.4 * len(surfaces) + 0.6, 3.3), title, ncols=len(surfaces), squeeze=False, **extra
    ) as (
        figure,
        grid,
    ):
        draw = _contours if flat else _hills
        draw(figure, list(grid.flat), surfaces, theme)
    return figure


def _contours(figure: Figure, axes: list[Axes], surfaces: Mapping[str, LossSurface], theme: str) -> None:
    levels = _levels(surfaces)
    filled = None
    for axis, (label, surface) in zip(axes, surfaces.items(), strict=True):
        x, y, z = surface.x.numpy(), surface.y.numpy(), surface.losses.numpy()
        filled = axis.contourf(x, y, z, levels=levels, cmap="cividis", extend="max")
        axis.contour(x, y, z, levels=levels, colors="#000000", linewidths=0.4, alpha=0.6)
        axis.plot(0, 0, marker="+", color="#ffffff", markersize=9, markeredgewidth=1.8)
        axis.set(title=label, xlabel="distance along direction 1", aspect="equal")
        axis.grid(False)
    axes[0].set_ylabel("distance along direction 2")
    figure.colorbar(filled, ax=axes, label="loss", shrink=0.85, format="%.3g", ticks=levels[::2])


def _hills(figure: Figure, axes: list[Any], surfaces: Mapping[str, LossSurface], theme: str) -> None:
    import numpy

    low, *_, high = _levels(surfaces)
    for axis, (label, surface) in zip(axes, surfaces.items(), strict=True):
        x, y = numpy.meshgrid(surface.x.numpy(), surface.y.numpy())
        z = surface.losses.numpy().clip(max=high)
        axis.plot_surface(
            x, y, z, cmap="cividis", vmin=low, vmax=high, rstride=1, cstride=1, linewidth=0.25,
            edgecolor=THEMES[theme]["ink"] + "60",
        )  # fmt: skip
        axis.set(title=label, xlabel="direction 1", ylabel="direction 2", zlim=(low, high))
        axis.set_zlabel("loss")
        axis.view_init(elev=28, azim=-58)
        axis.set_box_aspect(None, zoom=0.82)
        for side in (axis.xaxis, axis.yaxis, axis.zaxis):
            side.set_pane_color(THEMES[theme]["paper"])


def _levels(surfaces: Mapping[str, LossSurface]) -> list[float]:
    """Contour levels shared by all surfaces: even steps of the quantiles, so that steep walls do not eat the valley."""
    import numpy

    values = numpy.concatenate([surface.losses.numpy().ravel() for surface in surfaces.values()])
    values = values[numpy.isfinite(values)]
    if not len(values):
        raise ValueError("surfaces must hold finite losses, got none")
    spread = numpy.quantile(values, numpy.linspace(0, 1, 13))
    even = numpy.linspace(values.min(), values.max(), 13)
    levels = numpy.unique((spread + even) / 2)
    return levels.tolist() if len(levels) > 1 else [float(levels[0]), float(levels[0]) + 1e-9]


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


def _zero(axes: Axes, theme: str) -> None:
    axes.axhline(0, color=THEMES[theme]["faint"], linewidth=0.8, zorder=0.5)


def _finish(axes: Axes) -> None:
    axes.margins(x=0.02)
    axes.legend(handlelength=3.2)
