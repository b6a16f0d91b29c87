"""Figures of loss surfaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..utils.arguments import choice
from .style import THEMES, first_of, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flatlora.analysis import LossSurface


def plot_surface(
    surfaces: Mapping[str, LossSurface],
    *,
    kind: str = "contour",
    title: str | None = None,
    theme: str = "light",
    size: tuple[float, float] | None = None,
) -> Figure:
    """Loss surfaces beside each other on a common scale, as filled contours or in three dimensions.

    The color map is cividis, from dark to light with the loss, which is readable for color-blind readers and in
    grayscale. Since a loss rises steeply, the contour levels are spaced so that each band covers a similar area.

    Args:
        surfaces: label -> surface.
        kind: "contour" or "3d".
        title, theme: see `plot_loss_line`.
        size: width and height in inches; default: about 3.4 x 3.5 for each surface.

    Raises:
        ValueError: no surface, an unknown kind or theme, or a surface with less than two points along a side.
        ImportError: matplotlib is not installed.
    """
    first_of("surfaces", surfaces, "LossSurface")
    choice("kind", kind, ("contour", "3d"), "'contour' or '3d'")
    for label, surface in surfaces.items():
        if min(surface.losses.shape) < 2:
            raise ValueError(f"surfaces[{label!r}] must have at least 2 x 2 points, got {tuple(surface.losses.shape)}")
    flat = kind == "contour"
    extra = {"sharex": True, "sharey": True} if flat else {"subplot_kw": {"projection": "3d"}}
    size = size if size is not None else (3.4 * len(surfaces) + 0.6, 3.5)
    with new_figure(theme, size, title, ncols=len(surfaces), squeeze=False, **extra) as (figure, grid):
        draw = _contours if flat else _hills
        draw(figure, list(grid.flat), surfaces, theme)
    return figure


def _contours(figure: Figure, axes: list[Axes], surfaces: Mapping[str, LossSurface], theme: str) -> None:
    levels = _levels(surfaces)
    filled: Any = None
    for axis, (label, surface) in zip(axes, surfaces.items(), strict=True):
        x, y, z = surface.x.numpy(), surface.y.numpy(), surface.losses.numpy()
        filled = axis.contourf(x, y, z, levels=levels, cmap="cividis", extend="max")
        axis.contour(x, y, z, levels=levels, colors="#000000", linewidths=0.4, alpha=0.6)
        axis.plot(0, 0, marker="+", color="#ffffff", markersize=9, markeredgewidth=1.8)
        axis.set(title=label, xlabel="distance along direction 1", aspect="equal")
        axis.grid(False)
    axes[0].set_ylabel("distance along direction 2")
    layout: Any = figure.get_layout_engine()
    layout.set(wspace=0.06)  # keeps the outer tick labels of neighbors apart
    figure.colorbar(filled, ax=axes, label="loss", shrink=0.9, format="%.2g", ticks=levels[::2])


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
        axis.set(zlim=(low, high))
        axis.set_xlabel("direction 1", labelpad=7)
        axis.set_ylabel("direction 2", labelpad=7)
        axis.tick_params(labelsize=8, pad=1)
        axis.locator_params(nbins=5)
        axis.set_title(label, y=0.95, loc="center")
        axis.set_zlabel("loss")
        axis.view_init(elev=28, azim=-58)
        axis.set_box_aspect((1, 1, 0.85), zoom=0.76)
        for side in (axis.xaxis, axis.yaxis, axis.zaxis):
            side.set_pane_color(THEMES[theme]["paper"])


def _levels(surfaces: Mapping[str, LossSurface]) -> list[float]:
    """Contour levels for all surfaces: means of even steps and quantiles, to resolve the valley beside steep walls."""
    import numpy

    values = numpy.concatenate([surface.losses.numpy().ravel() for surface in surfaces.values()])
    values = values[numpy.isfinite(values)]
    if not len(values):
        raise ValueError("surfaces must hold finite losses, got none")
    spread = numpy.quantile(values, numpy.linspace(0, 1, 13))
    even = numpy.linspace(values.min(), values.max(), 13)
    levels = numpy.unique((spread + even) / 2)
    return levels.tolist() if len(levels) > 1 else [float(levels[0]), float(levels[0]) + 1e-9]
