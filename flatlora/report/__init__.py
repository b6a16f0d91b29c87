"""Make one self-contained HTML page about a run, or comparing several: ``python -m flatlora.report RUN_A RUN_B``.

A run is a folder. The page shows what it finds of

| file                                          | made by                  | shown as                      |
|-----------------------------------------------|--------------------------|-------------------------------|
| `adapter_config.json`, `flatlora_config.json` | `save_pretrained`        | settings, differences marked  |
| `trainer_state.json`, also in `checkpoint-*`  | `transformers.Trainer`   | training curves with rho      |
| `*.json`, `analysis/*.json`                   | `flatlora.analysis.save` | one figure and table for each |

Results with the same file name are drawn into one figure. For two runs that were measured on the same noise the paired
difference is given. The page contains its figures, light and dark, and needs no network.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flatlora.utils import arguments as checks
from flatlora.utils import jsonfiles
from flatlora.utils.arguments import WrongType, refuse, texts

from .page import document
from .runs import names_of, read_run
from .sections import result_sections, settings_section, training_section

__all__ = ["build", "main"]


def build(runs: Sequence[str | Path], labels: Sequence[str] | None = None, *, introduction: str = "") -> str:
    """The HTML page, as a string.

    Args:
        runs: folders, at least one.
        labels: one for each run; default: the names of the folders.
        introduction: HTML to be placed above the sections.

    Raises:
        ValueError: no run, labels that do not fit, or a folder without any content for the page.
        FileNotFoundError: a folder that does not exist.
        ImportError: matplotlib is not installed.
    """
    if isinstance(runs, (str, bytes, bytearray)) or not isinstance(runs, Sequence):
        refuse("runs", "a list of folders", runs, WrongType)
    folders = [Path(checks.path(f"runs[{k}]", run)) for k, run in enumerate(runs)]
    if not folders:
        refuse("runs", "a list of at least one folder", runs)
    given = texts("labels", labels, "a list of names", optional=True)
    names = names_of(folders) if given is None else given
    checks.text("introduction", introduction)
    if len(names) != len(folders) or len(set(names)) != len(names):
        raise ValueError(f"labels must be {len(folders)} different names, one for each run, got {names}")
    found = {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}
    sections = [settings_section(found), training_section(found), *result_sections(found)]
    return document(" against ".join(names), introduction + "".join(sections))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Args:
        arguments: of the command; default: those of the process.
    """
    parser = argparse.ArgumentParser("python -m flatlora.report", description="An HTML page about one or more runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--labels", nargs="+", help="names of the runs; default: their folders")
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
