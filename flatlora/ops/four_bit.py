"""A weight of 4-bit numbers in blocks that share a scale, as bitsandbytes stores it.

    W_e = dtype(code[c_e] * scale_b)     e = i n + j,  b = e // block
    scale_b = outer_code[q_b] * outer_scale[b // outer_block] + offset       (double quantization)

c_e are 4-bit indices, two in a byte, the first one in the high bits. `code` is the table of nf4 or fp4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import expect, integer

UINT8 = frozenset({torch.uint8})
FLOAT32 = frozenset({torch.float32})


@dataclass(frozen=True, eq=False)
class DoubleScales:
    """The 8-bit scales of double quantization.

    Attributes:
        code: (256,) float32.
        scales: (ceil(blocks / block),) float32, one for each `block` scales.
        offset: () float32, added to each.
        block: a power of two.
    """

    code: Tensor
    scales: Tensor
    offset: Tensor
    block: int


@dataclass(frozen=True, eq=False)
class FourBitWeight:
    """A frozen weight (m, n) in 4 bits, or a block of its rows; see `flatlora.ops.four_bit`.

    Attributes:
        packed: (ceil(elements / 2),) uint8 of the whole weight.
        scales: (ceil(elements / block),) of the whole weight: float32, or uint8 with `double`.
        code: (16,) float32.
        shape: (m, n) of this block of rows.
        dtype: to which a dequantized number is rounded.
        block: elements that share a scale, a power of two.
        double: how the scales are quantized, or None.
        first: index of the first row in the whole weight.

    Raises:
        TypeError, ValueError: attributes that do not fit each other.
    """

    packed: Tensor
    scales: Tensor
    code: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block: int
    double: DoubleScales | None = None
    first: int = 0

    def __post_init__(self) -> None:
        (m, n), device = self.shape, self.packed.device
        elements = (integer("first", self.first, 0, 1 << 60) + m) * n
        for name, size in (("block", self.block), ("double.block", self.double.block if self.double else 2)):
            if size < 2 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two, got {size}")
        expect("packed", self.packed, (self.packed.numel(),), UINT8, None)
        expect("scales", self.scales, (self.scales.numel(),), UINT8 if self.double else FLOAT32, device)
        expect("code", self.code, (16,), FLOAT32, device)
        if 2 * self.packed.numel() < elements or self.block * self.scales.numel() < elements:
            raise ValueError(
                f"packed and scales must hold {elements} numbers, got {self.packed.numel()} bytes and "
                f"{self.scales.numel()} scales of {self.block}"
            )
        if self.double is not None:
            expect("double.code", self.double.code, (256,), FLOAT32, device)
            expect("double.scales", self.double.scales, (self.double.scales.numel(),), FLOAT32, device)
            expect("double.offset", self.double.offset, (), FLOAT32, device)
            if self.double.block * self.double.scales.numel() * self.block < elements:
                raise ValueError(f"double.scales are too few: {self.double.scales.numel()} for {elements} numbers")

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def __len__(self) -> int:
        return self.shape[0]

    def block_of_rows(self, rows: slice) -> FourBitWeight:
        """These rows, in 4 bits; nothing is copied."""
        start, stop, _ = rows.indices(len(self))
        return replace(self, shape=torch.Size((max(0, stop - start), self.shape[1])), first=self.first + start)

    def __getitem__(self, rows: slice) -> Tensor:
        """These rows, dequantized."""
        return self.block_of_rows(rows).dequantize()

    def dequantize(self) -> Tensor:
        """W, (m, n) of `dtype`, in plain torch."""
        m, n = self.shape
        e = torch.arange(self.first * n, (self.first + m) * n, dtype=torch.int64, device=self.device)
        index = (self.packed[e >> 1].int() >> (4 - 4 * (e & 1))) & 15
        b = e // self.block
        scale = self.scales[b]
        if self.double is not None:
            scale = self.double.code[scale.long()] * self.double.scales[b // self.double.block] + self.double.offset
        return (self.code[index] * scale).to(self.dtype).view(m, n)
