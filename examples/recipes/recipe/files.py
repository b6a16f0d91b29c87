"""Data: local `.jsonl` and `.csv` files, folders of images, and datasets of the hub, as rows with checked columns.

Local data have the forms that `datasets.load_dataset` knows as json, csv and imagefolder. Rows are read here, since an
error must name the file, the line and the column.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.data import load_task

from .processes import is_main

Row = dict[str, Any]
HELD_OUT = 0.1  # of a local file, for the test
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load_rows(dataset: str, columns: Sequence[str], split: str = "train", limit: int | None = None) -> list[Row]:
    """Rows of a local file, or of a dataset on the hub.

    Args:
        dataset: a `.jsonl` or `.csv` file; or a hub name, `name` or `name:configuration`.
        columns: that every row must have.
        split: of a hub dataset; a local file has one.
        limit: at most so many rows, the first.

    Raises:
        FileNotFoundError: no such local file.
        ValueError: a line that cannot be read, or without a column; no row at all.
    """
    if Path(dataset).suffix in (".csv", ".jsonl"):
        return read_rows(Path(dataset), columns, limit)
    return hub_rows(dataset, columns, split, limit)


def read_rows(path: Path, columns: Sequence[str], limit: int | None = None) -> list[Row]:
    """The rows of a local file; see `load_rows`."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; give a .jsonl or .csv file that exists")
    rows: list[Row] = []
    for line, row in _csv_lines(path) if path.suffix == ".csv" else _json_lines(path):
        missing = [name for name in columns if row.get(name) is None]
        if missing:
            has = ", ".join(name for name in row if name is not None) or "nothing"
            raise ValueError(f"{path}, line {line}: column {missing[0]!r} is missing; the line has {has}")
        rows.append(row)
        if limit is not None and len(rows) == limit:
            break
    if not rows:
        raise ValueError(f"{path} must hold at least one row with the columns {', '.join(columns)}, got none")
    return rows


def _csv_lines(path: Path) -> Iterator[tuple[int, Row]]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row:
                names = len(reader.fieldnames or ())
                raise ValueError(f"{path}, line {reader.line_num}: more values than the {names} columns of the header")
            yield reader.line_num, row


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: must be an object with columns, got {type(row).__name__}")
            yield number, row


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """One object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def hub_rows(dataset: str, columns: Sequence[str], split: str, limit: int | None = None) -> list[Row]:
    """The rows of a dataset on the hub; see `load_rows`. Classes have their names; rows without one (-1) drop out."""
    part = hub_dataset(dataset, columns, split)
    classes = {name: part.features[name].names for name in columns if hasattr(part.features[name], "names")}
    rows: list[Row] = []
    for row in part:
        if any(row[name] == -1 for name in classes):
            continue
        rows.append({**row, **{name: names[row[name]] for name, names in classes.items()}})
        if limit is not None and len(rows) == limit:
            break
    return rows


def hub_dataset(dataset: str, columns: Sequence[str], split: str) -> Any:
    """A `datasets.Dataset` of the hub, whose rows are read when they are asked for.

    Version 4 of `datasets` runs no loading scripts; of a dataset that has one, the copy in Parquet is read that the hub
    keeps.

    Raises:
        ValueError: it lacks a column.
    """
    from datasets import load_dataset

    name, _, configuration = dataset.partition(":")
    announce(name, "dataset")
    try:
        part = load_dataset(name, configuration or None, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        part = load_dataset(name, configuration or None, split=split, revision="refs/convert/parquet")
    missing = [column for column in columns if column not in part.column_names]
    if missing:
        raise ValueError(f"{dataset} must have a column {missing[0]!r}, got {', '.join(part.column_names)}")
    return part


def splits(dataset: str, columns: Sequence[str], test: str = "") -> tuple[list[Row], list[Row]]:
    """(training rows, test rows) of a local file, of which a tenth is held out, or of a dataset on the hub.

    Args:
        test: the split of a hub dataset that is the test; default: "validation".
    """
    if Path(dataset).suffix not in (".csv", ".jsonl"):
        return load_rows(dataset, columns, "train"), load_rows(dataset, columns, test or "validation")
    return held_out(read_rows(Path(dataset), columns), dataset)


def held_out(rows: list[Row], source: str | Path) -> tuple[list[Row], list[Row]]:
    """(training rows, test rows): a tenth is held out, at least one; always the same of the same rows.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(f"{source} must hold at least two rows, one of which is held out, got {len(rows)}")
    rows = random.Random(0).sample(rows, len(rows))
    held = max(1, round(HELD_OUT * len(rows)))
    return rows[held:], rows[:held]


def few(rows: list[Row], shots: int, seed: int) -> list[Row]:
    """So many rows of each label, drawn by the seed; all rows of a label that has fewer, which is printed."""
    rng = random.Random(seed)
    by_label = {label: [row for row in rows if row["label"] == label] for label in sorted({r["label"] for r in rows})}
    if short := {label: len(own) for label, own in by_label.items() if len(own) < shots}:
        print(f"--few_shot {shots}: these labels have fewer examples, which are all taken: {short}")
    return [row for own in by_label.values() for row in rng.sample(own, min(shots, len(own)))]


def movie_reviews(
    train: int | None = None, test: int | None = None, column: str = "text"
) -> tuple[list[Row], list[Row]]:
    """(training rows, test rows) of the packaged movie reviews: a column of text, and `label` negative or positive."""
    task = load_task("movie")
    rows = [
        [{column: x.text, "label": task.labels[x.label]} for x in examples]
        for examples in (task.train[:train], task.tests["movie"][:test])
    ]
    return rows[0], rows[1]


def read_images(folder: Path, columns: Sequence[str] = ("label",)) -> list[Row]:
    """The images of a folder: `{"image": path, ...}` in the order of their names.

    The folder holds either one folder of images per label, or images with a `metadata.csv` or `metadata.jsonl` whose
    column `file_name` names them.

    Args:
        columns: of the metadata; `label` is the folder's name where there are folders.

    Raises:
        FileNotFoundError: no such folder, or an image that the metadata name is missing.
        ValueError: no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give a folder of images that exists")
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).exists():
            rows = read_rows(folder / name, ["file_name", *columns])
            if lost := [row["file_name"] for row in rows if not (folder / row["file_name"]).exists()]:
                raise FileNotFoundError(f"{folder / name} names {lost[0]}, which is not in {folder}")
            return [{**row, "image": folder / row["file_name"]} for row in rows]
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not found:
        raise ValueError(f"{folder} must hold images ({', '.join(IMAGES)}), in one folder per label, got none")
    return [{"image": path, "label": path.parent.name} for path in found]


def image_splits(folder: Path, columns: Sequence[str] = ("label",)) -> tuple[list[Row], list[Row]]:
    """(training rows, test rows) of a folder of images; see `read_images`.

    A folder with the folders `train` and `test` (or `validation`) has both; of another one a tenth is held out.
    """
    for test in ("test", "validation"):
        if (folder / "train").is_dir() and (folder / test).is_dir():
            return read_images(folder / "train", columns), read_images(folder / test, columns)
    return held_out(read_images(folder, columns), folder)


def announce(name: str, kind: str) -> None:
    """Print what will be downloaded from the hub, with its size where the hub is reached; nothing if it is local."""
    from huggingface_hub import HfApi, constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    if Path(name).exists() or not is_main():
        return
    try:
        kept = {(repo.repo_type, repo.repo_id) for repo in scan_cache_dir().repos}
    except CacheNotFound:
        kept = set()
    if (kind, name) in kept:
        return
    size = ""
    if not constants.HF_HUB_OFFLINE:
        try:
            files = HfApi().repo_info(name, repo_type=kind, files_metadata=True).siblings or []
            size = f", up to {sum(file.size or 0 for file in files) / 1e9:.1f} GB"
        except Exception:  # without a network, the loading that follows says it better
            size = ""
    print(f"Downloading the {kind} {name} from the Hugging Face hub{size}, into {constants.HF_HUB_CACHE}", flush=True)
