"""Sections of the report: settings, training and results."""

from __future__ import annotations

from html import escape
from typing import Any

from flatlora import analysis, plotting
from flatlora.analysis.stats import Curve

from .page import Plot, figure, table
from .runs import Run

Runs = dict[str, Run]  # by label


def settings_section(runs: Runs) -> str:
    """A table of the settings, in which differing rows are highlighted."""
    keys = list(dict.fromkeys(key for run in runs.values() for key in run.settings))
    if not keys:
        return ""
    rows, differs = [], []
    for key in keys:
        values = [_text(run.settings.get(key)) for run in runs.values()]
        rows.append([key, *values])
        differs.append(len(set(values)) > 1)
    return f"<h2>Settings</h2>\n<div class=settings>{table(['', *runs], rows, differs)}</div>\n"


def _text(value: Any) -> str:
    return ", ".join(sorted(map(str, value))) if isinstance(value, list) else "—" if value is None else str(value)


def training_section(runs: Runs) -> str:
    """A figure of the training curves."""
    keys = {"loss", "eval_loss", "flat_rho"}
    histories = {name: run.history for name, run in runs.items() if any(keys & set(row) for row in run.history)}
    if not histories:
        return ""
    return "<h2>Training</h2>\n" + figure(plotting.plot_training, histories, "training curves")


def result_sections(runs: Runs) -> list[str]:
    """A section for each file name, with the results of all runs in one figure."""
    parts = []
    for stem in dict.fromkeys(stem for run in runs.values() for stem in run.results):
        results = {name: run.results[stem] for name, run in runs.items() if stem in run.results}
        heading = stem.replace("_", " ").replace("-", " ").capitalize()
        parts.append(f"<h2>{escape(heading)}</h2>\n" + _result(results, heading))
    return parts


def _plot_surface_3d(results: Any, *, theme: str) -> Any:
    return plotting.plot_surface(results, kind="3d", theme=theme)


PLOTS: dict[type, list[Plot]] = {
    analysis.LossLine: [plotting.plot_loss_line],
    analysis.LossSurface: [plotting.plot_surface, _plot_surface_3d],
    analysis.ExpectedSharpness: [plotting.plot_sharpness],
    analysis.SamSharpness: [plotting.plot_sharpness],
    analysis.SpectralDensity: [plotting.plot_spectrum],
    analysis.Degradation: [plotting.plot_degradation],
}


def _result(results: dict[str, Any], heading: str) -> str:
    kinds = {type(result) for result in results.values()}
    if len(kinds) > 1:
        return f"<p class=note>Not compared: {escape(', '.join(sorted(k.__name__ for k in kinds)))}.</p>\n"
    (kind,) = kinds
    try:
        text = "".join(figure(plot, results, heading) for plot in PLOTS[kind])
    except ValueError as error:  # results with one file name that do not fit into one figure
        return f"<p class=note>Not drawn: {escape(str(error))}.</p>\n"
    return text + (_curves(results) if issubclass(kind, Curve) else "")


def _curves(results: dict[str, Curve]) -> str:
    """A table with the mean and its 95 % interval at each point of any run, and the paired difference of two runs."""
    first = next(iter(results.values()))
    columns = dict(results)
    note = "Mean and 95 % interval."
    if len(results) == 2:
        (a, one), (b, two) = results.items()
        try:
            columns[f"{b} − {a}, paired"] = two.minus(one)
        except ValueError as error:
            note += f" No paired difference: {error}."
    cells = {}
    for name, curve in columns.items():
        low, high = curve.interval()
        for k, x in enumerate(curve.grid.tolist()):
            cells[name, x] = _number(curve.mean[k].item(), low[k].item(), high[k].item())
    falls = bool(first.grid[0] > first.grid[-1])  # numbers of bits fall
    points = sorted({x for _, x in cells}, reverse=falls)
    rows = [[f"{x:.4g}", *(cells.get((name, x), "—") for name in columns)] for x in points]
    center = ["undisturbed", *(f"{curve.center:.4g}" for curve in columns.values())]
    head = [getattr(first, "unit", first.GRID), *columns]
    return f"<p class=note>{escape(note)}</p>\n" + table(head, [center, *rows])


def _number(mean: float, low: float, high: float) -> str:
    return f"{mean:.3g}" + (f" [{low:.3g}, {high:.3g}]" if low == low else "")
