"""The noise contract in Triton, for CUDA and ROCm: W + eps, and the row norms of W + s B A, in one kernel.

`perturb` adds noise of given standard deviations. `perturb_merged` first computes the row norms, to which the noise is
relative, so that a forward needs no other kernel for its noise. W is dense or stored in 4 bits (`four_bit.py`).

Bytes per weight that must come from and go to DRAM, for W of w bytes and W + eps of o bytes:

    perturb          w + o    W is read once and W + eps is written once, the minimum
    perturb_merged   w + o    if the rows that are being computed fit into the L2 cache, from which they are read the
                              second time: two programs of 16 rows for each multiprocessor, so 35 MB on an H100 for
                              4,096 columns in bf16; else 2 w + o

where w is 2 or 4, or for 4-bit weights 0.5 and the scales of blocks of 64: 4 / 64 = 0.0625, or with double quantization
1 / 64 + 4 / (64 * 256) = 0.0159. For W itself in the dtype of the product, o is 2 or 4. Beside these: the standard
deviations or norms, 4 bytes per row; and from the L2 cache in `perturb_merged` A once for each 16 rows, r / 4 bytes
per weight in float32. `examples/benchmarks/roofline.py` counts the instructions and computes bounds from both.

Seed, sample and strength are read from device memory: a step needs no synchronization and no compilation, and a CUDA
graph that captured the kernel uses what `key` and `relative` hold at replay. Layer, first row, first tile, rank and m
are not specialized; n and the strides are specialized only on 1 and on multiples of 16, which decide how memory is
accessed, so layers share the compiled kernels. Addresses have 64 bits.
"""

# The functions under @triton.jit are compiled, not run: their parameters are values of Triton, which have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..utils.dtypes import accumulation_dtype
from .checks import MAX_COLUMNS, check_memory, check_noise, expect, expect_factors, integer, number
from .four_bit import FourBitWeight
from .triton_device import TILE, merged_norms, perturb_tiles
from .triton_tuning import MERGED, NOISE, BlockSize, choose, register_limit

OPEN = ["layer", "first_row", "first_tile", "first_stored", "m", "r"]  # one compiled kernel serves all of their values
MAX_SIZE = (1 << 31) - 512  # row and column indices within the weight are signed 32-bit integers
RANKS = 32  # of the factors at a time in shared memory
ROUND = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=[name for name in OPEN if name != "r"])
def perturb_kernel(
    out, o0, o1, weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
    row_std, relative, strength, key, index, layer, first_row, first_tile, shift, m, n,
    ROWS: tl.constexpr, TILES: tl.constexpr, GATHER: tl.constexpr, STRENGTH: tl.constexpr, SIZE: tl.constexpr,
    OUTER: tl.constexpr, PAIRED: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One program: a group of TILES tiles of ROWS rows. `index` holds the row indices if GATHER, else is not read."""
    groups = tl.cdiv(n + shift, TILE * TILES)
    i = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    if GATHER:  # noqa: SIM108  (a branch of Triton at compile time)
        row = tl.load(index + i, mask=i < m, other=0).to(tl.uint32)
    else:
        row = first_row.to(tl.uint32) + i.to(tl.uint32)
    std = tl.load(row_std + i, mask=i < m, other=0) * relative
    if STRENGTH:
        std = std * tl.load(strength).to(std.dtype)
    perturb_tiles(
        out, o0, o1, weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
        std, key, row, layer, first_tile, tl.program_id(0) % groups, shift, i, m, n,
        ROWS, TILES, SIZE, OUTER, PAIRED, ROUND, "evict_first",
    )  # fmt: skip


@triton.jit(do_not_specialize=OPEN)
def merged_kernel(
    out, o0, o1, weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
    norms, relative, strength, key, B, b0, A, a0, scaling, layer, first_row, first_tile, shift, r, m, n,
    RANKS: tl.constexpr, CHUNKED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, STRENGTH: tl.constexpr,
    SIZE: tl.constexpr, OUTER: tl.constexpr, PAIRED: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One program: all columns of ROWS rows, first their norms, then W + eps, which reads them again from the cache."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    norm = merged_norms(
        weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
        B, b0, A, a0, scaling, i, r, m, n, RANKS, CHUNKED, ROWS, SIZE, OUTER, PAIRED, ROUND,
    )  # fmt: skip
    tl.store(norms + i, norm, mask=i < m)
    std = norm * relative
    if STRENGTH:
        std = std * tl.load(strength).to(tl.float32)
    row = first_row.to(tl.uint32) + i.to(tl.uint32)
    for group in range(0, tl.cdiv(n + shift, TILE * TILES)):
        perturb_tiles(
            out, o0, o1, weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
            std, key, row, layer, first_tile, group, shift, i, m, n,
            ROWS, TILES, SIZE, OUTER, PAIRED, ROUND, "evict_first",
        )  # fmt: skip


def perturb(
    weight: Tensor | FourBitWeight,  # (m, n)
    row_std: Tensor,  # (m,)
    key: Tensor,  # (2,) int64
    layer: int,
    out: Tensor,  # (m, n)
    *,
    relative: float | Tensor = 1.0,
    first_row: int = 0,
    first_column: int = 0,
    rows: Tensor | None = None,  # (m,) int64
) -> None:
    """Write ``weight + relative * row_std[:, None] * z`` into `out`.

    Args:
        weight: (m, n), dense or in 4 bits.
        row_std, key, layer: see `perturb_weight`.
        out: (m, n), any strides.
        relative: factor of `row_std`; a tensor of one element is read when the kernel runs.
        first_row, first_column: index of ``weight[0, 0]`` in the whole weight.
        rows: the indices of all rows, instead of `first_row`.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, or a weight that is too large.
    """
    _check(weight, row_std, key, layer, out, relative, first_row, first_column, rows)
    m, n = weight.shape
    if m == 0 or n == 0:
        return
    wide = accumulation_dtype(weight.dtype)
    if wide == torch.float64 and not isinstance(relative, Tensor):  # a number enters the kernel as float32
        row_std, relative = row_std * relative, 1.0
    row_std = row_std.to(wide).contiguous()
    index = key if rows is None else rows.to(torch.int64).contiguous()
    check_memory([("out", out)], [*_stored(weight), ("row_std", row_std), ("key", key), ("rows", rows)])
    shared = _operands(weight, out, first_column)
    noise = _noise(relative, key, layer, first_row) | register_limit(isinstance(weight, FourBitWeight))

    def run(size: BlockSize) -> None:
        groups = triton.cdiv(n + shared["shift"], TILE.value * size.tiles)
        perturb_kernel[(triton.cdiv(m, size.rows) * groups,)](
            row_std=row_std, index=index, GATHER=rows is not None, ROWS=size.rows, TILES=size.tiles,
            num_warps=size.warps, **shared, **noise,
        )  # fmt: skip

    _launch(run, NOISE, weight, out, ())


def perturb_merged(
    weight: Tensor | FourBitWeight,  # (m, n)
    norms: Tensor,  # (m,)
    key: Tensor,  # (2,) int64
    layer: int,
    out: Tensor,  # (m, n)
    factors: tuple[Tensor, Tensor, float],  # B (m, r), A (r, n), s
    *,
    relative: float | Tensor = 1.0,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """Write ``||W_i + s (B A)_i||`` into `norms`, and ``W + relative * norms[:, None] * z`` into `out`.

    Args:
        weight: (m, n), float32, bfloat16, float16 or in 4 bits.
        norms: (m,) float32, contiguous.
        factors: B, A and s, of any rank.
        key, layer, out, relative, first_row, first_column: see `perturb`.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, or a weight that is too large.
    """
    _check(weight, norms, key, layer, out, relative, first_row, first_column, None)
    (m, n), (B, A, scaling) = weight.shape, factors
    expect_factors(B, A, m, n, weight.device)
    if not has_norms(weight) or norms.dtype != torch.float32 or not norms.is_contiguous():
        raise ValueError(
            "with factors, row_std is written: it must be float32 and contiguous, and the weight float32, bfloat16, "
            f"float16 or in 4 bits, got {norms.dtype} of stride {norms.stride()} and {weight.dtype}"
        )
    if m == 0 or n == 0:
        norms.zero_()
        return
    B, A = (x.to(torch.float32) if x.dtype == torch.float64 else x for x in (B, A))
    B, A = B.contiguous(), A.contiguous()
    r = A.shape[0]
    check_memory([("out", out), ("row_std", norms)], [*_stored(weight), ("B", B), ("A", A), ("key", key)])
    if r == 0:
        B = A = norms  # nothing is read from them
    shared = _operands(weight, out, first_column)
    ranks = min(max(16, triton.next_power_of_2(r)), RANKS)
    noise = _noise(relative, key, layer, first_row) | register_limit(isinstance(weight, FourBitWeight), ranks)

    def run(size: BlockSize) -> None:
        merged_kernel[(triton.cdiv(m, size.rows),)](
            norms=norms, B=B, b0=r, A=A, a0=n, scaling=number("scaling", scaling), r=r, RANKS=ranks, CHUNKED=r > ranks,
            ROWS=size.rows, TILES=size.tiles, num_warps=size.warps, **shared, **noise,
        )  # fmt: skip

    _launch(run, MERGED, weight, out, (ranks, r > ranks, A.dtype))


def has_norms(weight: Tensor | FourBitWeight) -> bool:
    """Whether `perturb_merged` takes this weight."""
    return isinstance(weight, FourBitWeight) or weight.dtype in ROUND


def _check(
    weight: Tensor | FourBitWeight,
    row_std: Tensor,
    key: Tensor,
    layer: int,
    out: Tensor,
    relative: float | Tensor,
    first_row: int,
    first_column: int,
    rows: Tensor | None,
) -> None:
    check_noise(weight, row_std, key, layer, out, first_row, rows)  # type: ignore[arg-type]  # of its shape and device
    m, n = weight.shape
    integer("first_column", first_column, 0, max(1, MAX_COLUMNS - n + 1))
    if max(m, n) >= MAX_SIZE:
        raise ValueError(f"weight must have less than {MAX_SIZE} rows and columns for backend 'triton', got {(m, n)}")
    if isinstance(weight, FourBitWeight) and weight.dtype not in ROUND:
        raise TypeError(f"a weight in 4 bits must be dequantized to one of {list(ROUND)}, got {weight.dtype}")
    if isinstance(relative, Tensor):
        expect("relative", relative, (), None, weight.device)
        check_memory([], [("relative", relative)])


def _stored(weight: Tensor | FourBitWeight) -> list[tuple[str, Tensor | None]]:
    """The tensors in which a weight is stored, by name."""
    if not isinstance(weight, FourBitWeight):
        return [("weight", weight)]
    double = weight.double
    outer = [] if double is None else [("codes", double.code), ("scales", double.scales), ("offset", double.offset)]
    return [("packed", weight.packed), ("scales", weight.scales), ("code", weight.code), *outer]


def _operands(weight: Tensor | FourBitWeight, out: Tensor, first_column: int) -> dict[str, Any]:
    """The arguments of both kernels that describe the weight and the result."""
    (m, n), tile = weight.shape, TILE.value
    shift = first_column % tile
    places = dict(out=out, o0=out.stride(0), o1=out.stride(1), first_tile=first_column // tile, shift=shift, m=m, n=n)
    if not isinstance(weight, FourBitWeight):
        unused = dict.fromkeys(("codes", "scales", "outer_codes", "outer_scales", "offset"), out)
        return places | unused | dict(
            weight=weight, w0=weight.stride(0), w1=weight.stride(1), first_stored=0, SIZE=-1, OUTER=-1, PAIRED=False,
            ROUND=tl.float32,
        )  # fmt: skip
    packed, scales, code = (tensor.contiguous() for tensor in (weight.packed, weight.scales, weight.code))
    outer = dict(outer_codes=code, outer_scales=code, offset=code, OUTER=-1)  # not read
    if weight.double is not None:
        d = weight.double
        outer = dict(outer_codes=d.code, outer_scales=d.scales, offset=d.offset, OUTER=d.block.bit_length() - 1)
    return places | outer | dict(
        weight=packed, w0=n, w1=1, first_stored=weight.first, codes=code, scales=scales,
        SIZE=weight.block.bit_length() - 1, PAIRED=n % 2 == 0 and shift % 2 == 0, ROUND=ROUND[weight.dtype],
    )  # fmt: skip


def _noise(relative: float | Tensor, key: Tensor, layer: int, first_row: int) -> dict[str, Any]:
    """The arguments of both kernels that describe the noise."""
    is_tensor, key = isinstance(relative, Tensor), key.contiguous()
    return {
        "relative": 1.0 if isinstance(relative, Tensor) else number("relative", relative),
        "strength": relative if is_tensor else key, "STRENGTH": is_tensor, "key": key,
        "layer": _int32(layer), "first_row": _int32(first_row),
    }  # fmt: skip


def _launch(run: Any, sizes: tuple[BlockSize, ...], weight: Tensor | FourBitWeight, out: Tensor, kind: Any) -> None:
    stored = weight.dtype if isinstance(weight, Tensor) else (weight.block, weight.double is not None)
    m, n = weight.shape
    # Triton launches on the current device
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # torch's
        run(choose(sizes, (m, n, stored, out.dtype, kind), m * n, out.device, run))


def _int32(value: int) -> int:
    """The value modulo 2^32 as a signed 32-bit integer: one argument type, so one compiled kernel, for all values."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)
