"""Read the folders of runs: settings, training history and results."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatlora import analysis
from flatlora.analysis.serialization import result_kind
from flatlora.plotting.curves import check_history
from flatlora.utils import jsonfiles

HINT = "Take the file from a backup, or delete it"
SETTINGS = (
    "base_model_name_or_path", "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora",
    "target_modules",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        settings: of the adapter.
        history: the log history of the trainer.
        results: of `flatlora.analysis`, by the name of their file.
    """

    settings: dict[str, Any]
    history: list[dict[str, Any]]
    results: dict[str, Any]


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: a damaged file, or a folder without any content for a report.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"run {folder} must be a folder")
    settings: dict[str, Any] = {}
    for name in ("adapter_config.json", "flatlora_config.json"):
        for path in (folder / name, folder / "adapter" / name):
            if path.exists():
                content = jsonfiles.read(path, HINT, strict=False)
                settings |= {k: v for k, v in content.items() if name.startswith("flatlora") or k in SETTINGS}
                break
    states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    histories = [_history(path) for path in states if path.exists()]
    files = sorted([*folder.glob("*.json"), *folder.glob("analysis/*.json")])
    results = {path.stem: analysis.load(path) for path in files if _is_result(path)}
    if not (settings or histories or results):
        raise ValueError(f"run {folder} must hold an adapter, trainer_state.json or results saved by flatlora.analysis")
    return Run(settings, max(histories, key=len, default=[]), results)


def names_of(folders: list[Path]) -> list[str]:
    """The names of the folders, each with as many parents as needed to make them different."""
    paths = [folder.resolve().parts for folder in folders]
    names: list[str] = []
    for depth in range(1, max(map(len, paths), default=1) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _history(file: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = jsonfiles.read(file, HINT, strict=False).get("log_history", [])
    try:
        check_history("log_history", history)
    except ValueError as error:
        raise ValueError(f"{file} cannot be used: {error}. {HINT}.") from None
    return history


def _is_result(file: Path) -> bool:
    """Whether the file is a result of `flatlora.analysis`, intact or damaged, and not another JSON file."""
    try:
        return result_kind(jsonfiles.read(file, HINT, strict=False)) is not None
    except ValueError:
        with contextlib.suppress(OSError):
            start = file.read_bytes()[:64].strip()
            return not start or start.startswith(b'{"result"')
        return False
