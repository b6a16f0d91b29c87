import hashlib
import json
import subprocess
from pathlib import Path

import models
import packages
import pytest

CONTENT = b"an archive"
PACKAGE = packages.Package("made-up==1.0", "made_up-1.0.tar.gz", hashlib.sha256(CONTENT).hexdigest(), "a test")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    """pip that writes `pip.content`, or fails; keeps its command and its requirements."""

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
    (folder / "sha256.json").write_text(json.dumps({"model.safetensors": hashlib.sha256(b"weights").hexdigest()}))
    assert models.resolve_model("smollm2") == str(folder)
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ValueError, match="model.safetensors"):
        models.resolve_model("smollm2")


def test_other_models_are_left_to_transformers():
    assert models.resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
