"""Rows of a quantized weight as floating-point numbers, or its row norms from the layer's own forward.

| stored by                     | rows                                                                             |
|-------------------------------|----------------------------------------------------------------------------------|
| bitsandbytes, 4 bits          | dequantized block by block                                                       |
| bitsandbytes, 8 bits          | the same                                                                         |
| torchao, HQQ, INC             | dequantized as a whole, by the package                                           |
| others                        | not available: ||W_i||^2 and A W^T come from the layer's own forward, which is   |
|                               | affine, on the unit vectors (once) and on the rows of A                          |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import merged_row_norms, row_norms_of_sum, squared_row_norms
from ..ops.blocks import row_blocks
from ..ops.checks import Matrix
from ..ops.four_bit import DoubleScales, FourBitWeight
from .supported import FLOATS


class FourBitRows:
    """Rows of a 4-bit weight of bitsandbytes.

    Each block of `blocksize` numbers has a scale (absmax). With double quantization the scales are stored in 8 bits,
    256 of them to a scale.
    """

    def __init__(self, base: Any) -> None:
        weight = base.weight
        # FSDP keeps the state on the layer
        self.packed, self.state = weight.data, getattr(weight, "quant_state", None) or base.quant_state
        if getattr(self.state, "packing_format_for_cpu", False):
            self.packed, self.state = _standard_packing(self.packed, self.state)
        self.shape, self.dtype = torch.Size(self.state.shape), self.state.dtype
        self.device = self.packed.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        import bitsandbytes.functional as F

        (m, n), size = self.shape, self.state.blocksize
        if n % size or (not rows.start and rows.stop >= m):  # a block must not extend over the end of a row
            whole: Tensor = F.dequantize_4bit(self.packed, self.state)
            return whole[rows]
        start, stop = rows.start * n, min(rows.stop, m) * n
        scales = self._scales(start // size, stop // size)
        state = F.QuantState(  # type: ignore[no-untyped-call]  # bitsandbytes'
            scales, (stop // n - rows.start, n), blocksize=size, quant_type=self.state.quant_type, dtype=self.dtype
        )
        return F.dequantize_4bit(self.packed.view(torch.uint8).view(-1)[start // 2 : stop // 2], state)

    def in_four_bits(self) -> FourBitWeight:
        """The weight as it is stored, for a kernel that decodes it."""
        state, double = self.state, None
        if state.nested:
            outer = state.state2
            double = DoubleScales(outer.code.float(), outer.absmax.float(), state.offset.float(), outer.blocksize)
        scales = state.absmax if state.nested else state.absmax.float()
        packed = self.packed.view(torch.uint8).view(-1)
        return FourBitWeight(packed, scales, state.code.float(), self.shape, self.dtype, state.blocksize, double)

    def _scales(self, first: int, last: int) -> Tensor:
        import bitsandbytes.functional as F

        state = self.state
        if not state.nested:
            absmax: Tensor = state.absmax[first:last]
            return absmax.float()
        size = state.state2.blocksize
        a, b = first // size, -(-last // size)
        scales = F.dequantize_blockwise(
            state.absmax[a * size : b * size], absmax=state.state2.absmax[a:b], code=state.state2.code, blocksize=size
        )
        found: Tensor = (scales[first - a * size : last - a * size] + state.offset).float()
        return found


class EightBitRows:
    """Rows of an 8-bit weight of bitsandbytes: integers of up to 127, and a scale for each row."""

    dtype = torch.float32

    def __init__(self, base: Any) -> None:
        self.integers, self.shape = base.weight.data, base.weight.shape
        self.scales = base.weight.SCB if base.state.SCB is None else base.state.SCB

    def __len__(self) -> int:
        m: int = self.shape[0]
        return m

    def __getitem__(self, rows: slice) -> Tensor:
        dense: Tensor = self.integers[rows].float() * (self.scales[rows, None].float() / 127)
        return dense


def quantized_rows(base: Any) -> Matrix | None:
    """The rows of a quantized weight, or None if they are not available."""
    weight: Any = base._parameters.get("weight")
    rows: Tensor | None
    if hasattr(base, "quant_state"):  # by attributes, because a pickled weight loses its class
        return FourBitRows(base)
    if hasattr(base, "state") and weight.dtype == torch.int8:
        return EightBitRows(base)
    if hasattr(base, "W_q"):
        rows = base.dequantize()
        return rows
    if type(weight).__module__.startswith("torchao."):
        rows = weight.dequantize()
        return rows
    if hasattr(base, "quant_input"):  # Neural Compressor keeps (in, out); on Gaudi only its kernel knows the scales
        dequantize = getattr(base, "dequant_weights", getattr(base, "qdq_weights", None))
        rows = None if dequantize is None else dequantize(weight).T
        return rows
    rows = weight if weight is not None and weight.dtype in FLOATS else None
    return rows


@torch.no_grad()
def squared_norms(base: nn.Module, n: int, dtype: torch.dtype) -> Tensor:
    """``||W_i||^2``, (m,) float32.

    Args:
        base: the layer.
        n: columns of W.
        dtype: dtype of the input of the layer's forward.
    """
    rows: Any = quantized_rows(base)
    if rows is not None:
        return squared_row_norms(rows)
    device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
    total: Any = 0
    for columns in row_blocks(n, n, dtype.itemsize):
        units = torch.zeros(columns.stop - columns.start, n, dtype=dtype, device=device)
        units[:, columns].fill_diagonal_(1)
        total = total + _products(base, units).square().sum(dim=0)
    norms: Tensor = total
    return norms


@torch.no_grad()
def quantized_row_norms(base: nn.Module, squared: Tensor, B: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """``||(W + B A)_i||``, (m,) float32, with B, (m, r), and A, (r, n); the rest as in `squared_norms`."""
    rows: Any = quantized_rows(base)
    if rows is None:
        return row_norms_of_sum(squared, _products(base, A.to(dtype)), B, A)
    blocks = row_blocks(rows.shape[0], rows.shape[1], torch.float32.itemsize)
    return torch.cat([merged_row_norms(rows[here], squared[here], B[here], A) for here in blocks])


def _products(base: nn.Module, x: Tensor) -> Tensor:
    """``x W^T``, (k, m) float32: the output of the layer without the bias, which is its output at zero."""
    out: Tensor = base(torch.cat([x, torch.zeros_like(x[:1])])).float()
    return out[:-1] - out[-1]


def _standard_packing(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight in the layout that it had before bitsandbytes rearranged it for inference on this CPU."""
    import copy

    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)
    state.original_nested = False
    packed, state = _convert_weight_packed_for_cpu_inverse(packed, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return packed, state
