"""One self-contained HTML page about a run, or comparing several: ``python -m flatlora.report RUN_A RUN_B``.

A run is a folder. Whatever of this lies in it is shown:

| file                                          | made by                  | shown as                     |
|-----------------------------------------------|--------------------------|------------------------------|
| `adapter_config.json`, `flatlora_config.json` | `save_pretrained`        | settings, differences marked |
| `trainer_state.json`, also in `checkpoint-*`  | `transformers.Trainer`   | training curves with rho     |
| `*.json`, `analysis/*.json`                   | `flatlora.analysis.save` | a figure and a table each    |

Results of one file name are drawn together, and for two runs that were measured on the same noise the paired
difference is given. The page holds its figures, light and dark, and needs no network.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flatlora import analysis, plotting
from flatlora.analysis.serialization import result_kind
from flatlora.analysis.stats import Curve
from flatlora.plotting.curves import check_history
from flatlora.utils import arguments, jsonfiles
from flatlora.utils.arguments import WrongType, refuse, texts

WAY_OUT = "Take the file from a backup, or delete it"

SETTINGS = (
    "base_model_name_or_path", "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora",
    "target_modules",
)  # fmt: skip
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #6b6b6b; --line: #e2e2e2; --mark: #fdf3d7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ededed; --paper: #17191c; --faint: #a0a0a0; --line: #3a3d42; --mark: #4a3f1d; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; margin: 0.8rem 0; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--faint); font-weight: 600; }
.settings td, .settings th { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.settings td:first-child { white-space: nowrap; overflow-wrap: normal; }
tr.differs td { background: var(--mark); } p.note { color: var(--faint); font-size: 0.9rem; }
"""
Plot = Callable[..., Any]


def build(runs: Sequence[str | Path], labels: Sequence[str] | None = None) -> str:
    """The page, as a string.

    Args:
        runs: folders, at least one.
        labels: one for each; default the folders' names.

    Raises:
        ValueError: no run, labels that do not fit, or nothing to show in a folder.
        FileNotFoundError: a folder that is not there.
        ImportError: matplotlib is not installed.
    """
    if isinstance(runs, (str, bytes, bytearray)) or not isinstance(runs, Sequence):
        refuse("runs", "a list of folders", runs, WrongType)
    folders = [Path(arguments.path(f"runs[{k}]", run)) for k, run in enumerate(runs)]
    if not folders:
        refuse("runs", "a list of at least one folder", runs)
    given = texts("labels", labels, "a list of names", optional=True)
    names = _names(folders) if given is None else given
    if len(names) != len(folders) or len(set(names)) != len(names):
        raise ValueError(f"labels must be {len(folders)} different names, one for each run, got {names}")
    found = {name: _read(folder) for name, folder in zip(names, folders, strict=True)}
    title = " against ".join(names)
    parts = [_settings(found), _training(found), *_results(found)]
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{''.join(parts)}</body>\n</html>\n"
    )


def _names(folders: list[Path]) -> list[str]:
    """The folders' own names, with as many of their parents as it takes to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, paths), default=1) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path) -> dict[str, Any]:
    """Settings, training history and results of one run."""
    if not folder.is_dir():
        raise FileNotFoundError(f"run {folder} must be a folder")
    settings: dict[str, Any] = {}
    for name in ("adapter_config.json", "flatlora_config.json"):
        for path in (folder / name, folder / "adapter" / name):
            if path.exists():
                content = jsonfiles.read(path, WAY_OUT, strict=False)
                settings |= {k: v for k, v in content.items() if name.startswith("flatlora") or k in SETTINGS}
                break
    states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    histories = [_history(path) for path in states if path.exists()]
    files = sorted([*folder.glob("*.json"), *folder.glob("analysis/*.json")])
    results = {path.stem: analysis.load(path) for path in files if _is_result(path)}
    if not (settings or histories or results):
        raise ValueError(f"run {folder} must hold an adapter, trainer_state.json or results saved by flatlora.analysis")
    return {"settings": settings, "history": max(histories, key=len, default=[]), "results": results}


def _history(file: Path) -> list[dict[str, Any]]:
    history = jsonfiles.read(file, WAY_OUT, strict=False).get("log_history", [])
    try:
        check_history("log_history", history)
    except ValueError as error:
        raise ValueError(f"{file} cannot be used: {error}. {WAY_OUT}.") from None
    return history


def _is_result(file: Path) -> bool:
    """Whether this is a result of `flatlora.analysis`, a damaged one too, and not somebody else's file."""
    try:
        return result_kind(jsonfiles.read(file, WAY_OUT, strict=False)) is not None
    except ValueError:
        with contextlib.suppress(OSError):
            start = file.read_bytes()[:64].strip()
            return not start or start.startswith(b'{"result"')
        return False


def _settings(found: dict[str, Any]) -> str:
    keys = list(dict.fromkeys(key for run in found.values() for key in run["settings"]))
    if not keys:
        return ""
    rows, differs = [], []
    for key in keys:
        values = [_plain(run["settings"].get(key)) for run in found.values()]
        rows.append([key, *values])
        differs.append(len(set(values)) > 1)
    return f"<h2>Settings</h2>\n<div class=settings>{_table(['', *found], rows, differs)}</div>\n"


def _plain(value: Any) -> str:
    return ", ".join(sorted(map(str, value))) if isinstance(value, list) else "—" if value is None else str(value)


def _training(found: dict[str, Any]) -> str:
    keys = {"loss", "eval_loss", "flat_rho"}
    histories = {name: run["history"] for name, run in found.items() if any(keys & set(row) for row in run["history"])}
    if not histories:
        return ""
    return "<h2>Training</h2>\n" + _figure(plotting.plot_training, histories, "training curves")


def _results(found: dict[str, Any]) -> list[str]:
    parts = []
    for stem in dict.fromkeys(stem for run in found.values() for stem in run["results"]):
        results = {name: run["results"][stem] for name, run in found.items() if stem in run["results"]}
        heading = stem.replace("_", " ").replace("-", " ").capitalize()
        parts.append(f"<h2>{escape(heading)}</h2>\n" + _result(results, heading))
    return parts


def _result(results: dict[str, Any], heading: str) -> str:
    kinds = {type(result) for result in results.values()}
    if len(kinds) > 1:
        return f"<p class=note>Not compared: {escape(', '.join(sorted(k.__name__ for k in kinds)))}.</p>\n"
    (kind,) = kinds
    plots: dict[type, list[Plot]] = {
        analysis.LossLine: [plotting.plot_loss_line],
        analysis.LossSurface: [plotting.plot_surface, lambda r, **kw: plotting.plot_surface(r, kind="3d", **kw)],
        analysis.ExpectedSharpness: [plotting.plot_sharpness],
        analysis.SamSharpness: [plotting.plot_sharpness],
        analysis.SpectralDensity: [plotting.plot_spectrum],
        analysis.Degradation: [plotting.plot_degradation],
    }
    try:
        text = "".join(_figure(plot, results, heading) for plot in plots[kind])
    except ValueError as error:  # results of one name that cannot be drawn together
        return f"<p class=note>Not drawn: {escape(str(error))}.</p>\n"
    return text + (_curves(results) if issubclass(kind, Curve) else "")


def _curves(results: dict[str, Curve]) -> str:
    """The numbers: mean with its 95 % interval at every point, and the paired difference of two runs."""
    first = next(iter(results.values()))
    columns = dict(results)
    note = "Mean and 95 % interval."
    if len(results) == 2:
        (a, one), (b, two) = results.items()
        try:
            columns[f"{b} − {a}, paired"] = two.minus(one)
        except ValueError as error:
            note += f" No paired difference: {error}."
    grid = getattr(first, first.GRID)
    cells = {}
    for name, curve in columns.items():
        low, high = curve.interval()
        for k, x in enumerate(getattr(curve, curve.GRID).tolist()):
            cells[name, x] = _number(curve.mean[k].item(), low[k].item(), high[k].item())
    rows = [[f"{x:.4g}", *(cells.get((name, x), "—") for name in columns)] for x in grid.tolist()]
    centre = ["undisturbed", *(f"{curve.center:.4g}" for curve in columns.values())]
    return f"<p class=note>{escape(note)}</p>\n" + _table(
        [getattr(first, "unit", first.GRID), *columns], [centre, *rows]
    )


def _number(mean: float, low: float, high: float) -> str:
    return f"{mean:.3g}" + (f" [{low:.3g}, {high:.3g}]" if low == low else "")


def _table(head: list[str], rows: list[list[str]], differs: list[bool] | None = None) -> str:
    def cells(tag: str, row: list[str]) -> str:
        return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)

    marks = ["<tr class=differs>" if mark else "<tr>" for mark in differs or [False] * len(rows)]
    body = "\n".join(f"{mark}{cells('td', row)}</tr>" for mark, row in zip(marks, rows, strict=True))
    return f"<div class=wide><table><thead><tr>{cells('th', head)}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"


def _figure(plot: Plot, results: dict[str, Any], alt: str) -> str:
    """A figure in both themes; the browser shows the one that fits."""
    with plotting.style.themed("light"):  # which says what to do without it
        import matplotlib

    sources = []
    for theme in ("light", "dark"):
        out = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "flatlora"}):  # the same page from the same runs
            plot(results, theme=theme).savefig(out, format="svg", metadata={"Date": None})
        sources.append("data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode())
    light, dark = sources
    return (
        f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(alt)}"></picture>\n'
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m flatlora.report", description="An HTML page about one or more runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--labels", nargs="+", help="names of the runs; default their folders")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="default: report.html")
    args = parser.parse_args(texts("arguments", arguments, optional=True))
    try:
        page = build(args.runs, args.labels)
        jsonfiles.write(args.out, page)
    except (ValueError, ImportError, OSError) as error:
        system = getattr(error, "strerror", None)
        reason = f"{args.out} cannot be written: {system}; give another -o" if system else error
        parser.exit(2, f"{parser.prog}: {reason}\n")
    print(args.out)


if __name__ == "__main__":
    main()
