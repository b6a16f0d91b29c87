"""Pictures of paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from study import stats

from flatlora.plotting import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Differences = Mapping[str, torch.Tensor]  # label of a row -> differences, one per seed


def plot_differences(panels: Mapping[str, Differences], unit: str, theme: str = "light") -> Figure:
    """A row per label: the seeds as dots, their mean with its 95 % bootstrap interval; one panel per heading."""
    with style.themed(theme) as colors:
        from matplotlib.figure import Figure

        rows = max(len(panel) for panel in panels.values())
        figure = Figure(figsize=(1.5 + 3.1 * len(panels), 0.9 + 0.36 * rows), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, (heading, panel) in zip(axes, panels.items(), strict=True):
            ax.axvline(0, color=colors["faint"], linewidth=1)
            for y, d in enumerate(panel.values()):
                low, high = stats.bootstrap_interval(d)
                mean = d.mean().item()
                ax.plot(d, [y + 0.22] * len(d), "o", color=colors["faint"], markersize=3, alpha=0.7, clip_on=False)
                look = {"color": style.COLORS[theme][0], "capsize": 3, "linewidth": 1.8, "markersize": 5}
                ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", **look)
            ax.set_title(heading)
            ax.set_xlabel(unit)
        names = list(next(iter(panels.values())))
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_ylim(len(names) - 0.4, -0.6)
        return figure


def save(panels: Mapping[str, Differences], unit: str, path: Path) -> None:
    """As PATH_light.png and PATH_dark.png."""
    for theme in ("light", "dark"):
        figure = plot_differences(panels, unit, theme)
        figure.savefig(path.with_name(f"{path.name}_{theme}.png"), dpi=150)
