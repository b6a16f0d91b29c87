"""Pieces of an HTML page: the document, tables and figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

from flatlora import plotting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


class Plot(Protocol):
    """A function of `flatlora.plotting`."""

    def __call__(self, results: Mapping[str, Any], /, *, theme: str) -> Figure: ...


def document(title: str, body: str) -> str:
    """A self-contained HTML document."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{body}</body>\n</html>\n"
    )


def table(head: list[str], rows: list[list[str]], marked: list[bool] | None = None) -> str:
    """A table of texts, with some of the rows highlighted."""

    def cells(tag: str, row: list[str]) -> str:
        return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)

    starts = ["<tr class=differs>" if mark else "<tr>" for mark in marked or [False] * len(rows)]
    body = "\n".join(f"{start}{cells('td', row)}</tr>" for start, row in zip(starts, rows, strict=True))
    return f"<div class=wide><table><thead><tr>{cells('th', head)}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"


def figure(plot: Plot, results: Mapping[str, Any], alt: str) -> str:
    """A figure in the light and the dark theme, of which the browser shows one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with plotting.style.themed("light"):  # raises an ImportError that says how to install matplotlib
        import matplotlib

    sources = []
    for theme in ("light", "dark"):
        out = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "flatlora"}):  # identical pages for identical runs
            plot(results, theme=theme).savefig(out, format="svg", metadata={"Date": None})
        sources.append("data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode())
    light, dark = sources
    return (
        f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(alt)}"></picture>\n'
    )
