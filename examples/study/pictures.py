"""Pictures of paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from study import stats

from flatlora.plotting import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Differences = Mapping[str, torch.Tensor]  # label of a row -> differences, one per seed


def plot_differences(panels: Mapping[str, Differences], unit: str, theme: str = "light", across: int = 4) -> Figure:
    """A row per label: the seeds as dots, their mean with its 95 % bootstrap interval; one panel per heading.

    Args:
        panels: a label that a panel lacks, or that has no seeds, is an empty row.
        across: panels beside one another.
    """
    with style.themed(theme) as colors:
        from matplotlib.figure import Figure

        names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
        lines = -(-len(panels) // across)
        columns = -(-len(panels) // lines)
        size = (1.9 + 2.5 * columns, lines * (1.1 + 0.34 * len(names)))
        figure = Figure(figsize=size, layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=True).flat)
        for ax, (heading, panel) in zip(axes, panels.items(), strict=False):
            ax.axvline(0, color=colors["faint"], linewidth=1)
            for name, d in panel.items():
                draw_row(ax, names.index(name), d, style.COLORS[theme][0], colors["faint"])
            ax.set_title(heading)
            ax.tick_params(labelbottom=True)
        for ax in axes[len(panels) :]:
            ax.remove()
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_ylim(len(names) - 0.4, -0.6)
        figure.suptitle(unit[0].upper() + unit[1:], x=0.01, ha="left", fontsize=10)
        return figure


def draw_row(ax: Axes, y: int, d: torch.Tensor, color: str, faint: str) -> None:
    """Differences, their mean and its interval."""
    ax.plot(d, [y + 0.24] * len(d), "o", color=faint, markersize=2.5, alpha=0.7, clip_on=False)
    if len(d) > 1:
        mean, (low, high) = d.mean().item(), stats.bootstrap_interval(d)
        ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3, markersize=5)


def save(panels: Mapping[str, Differences], unit: str, path: Path) -> None:
    """As PATH_light.png and PATH_dark.png."""
    for theme in ("light", "dark"):
        figure = plot_differences(panels, unit, theme)
        figure.savefig(path.with_name(f"{path.name}_{theme}.png"), dpi=150)
