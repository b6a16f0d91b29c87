"""The noise contract in Triton, for CUDA and ROCm: out = W + std * z in one kernel.

Memory traffic: W is read once and W + eps is written once, in the dtype of the product, which is the minimum: 4 bytes
per weight for bf16, 6 for an fp32 weight under bf16 autocast (14 with W + eps in fp32 and a separate cast), 8 for fp32.
In addition, 4 bytes per row and tile for the standard deviation (0.06 bytes per weight, cached after the first tile)
and 16 bytes for the key. At the 3.35 TB/s of an H100 SXM the lower bound is 1.2 ps per weight in bf16.
Computation: one Philox call (20 wide products, 20 three-way xors) and two Box-Muller pairs for four weights, compiled
for sm_90 about 46 instructions per weight. At one instruction of 32 lanes per cycle in each of the four partitions of
132 multiprocessors and 1.7 GHz this takes 1.6 ps. By this estimate (not a measurement) a bf16 W + eps is bound by
instructions and an fp32 one (2.4 ps of traffic) by memory.

Seed and sample are read from device memory: a step needs no synchronization and no compilation, and a CUDA graph that
captured the kernel uses the sample that is in `key` at replay. Layer, first row and m are not specialized; n and the
strides are specialized only on 1 and on multiples of 16, which decide how memory is accessed, so layers share the
compiled kernels. Addresses have 64 bits.

Logarithm, sine and cosine are the polynomials of `csrc/noise_kernel.h`: the fast hardware functions exceed the error of
1e-5 that the contract allows where u is close to 1, and the polynomials give the same result in Triton's interpreter.
"""

# The functions under @triton.jit are compiled, not run: their parameters are values of Triton, which have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..utils.dtypes import accumulation_dtype
from .checks import check_memory, check_noise

LANES, TILE = tl.constexpr(16), tl.constexpr(64)
ROWS = 32  # rows of a program, which computes one tile of each
WARPS = 4
MAX_SIZE = (1 << 31) - 64  # row and column indices within the weight are signed 32-bit integers


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 words. A 64-bit product is one instruction; its low and high halves would be two."""
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _normals(radius_word, angle_word):
    """sqrt(-2 ln u) (cos t, sin t) of two words; the steps are explained in `csrc/noise_kernel.h`."""
    k = (radius_word >> 8).to(tl.int32)
    bits = (k.to(tl.float32) + 0.5).to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (bits >> 23) - 24
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    exact = (k - 16777216).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08
    f = tl.where(e == 0, exact, f)
    p = 0.2075742684974607
    p = p * f - 0.32676289599598524
    p = p * f + 0.34424853034065217
    p = p * f - 0.39768471150106893
    p = p * f + 0.49943120490794946
    p = p * f - 0.6667121579742487
    p = p * f + 1.0000068856300852
    p = p * f - 1.9999998357126516
    radius = tl.sqrt(p * f - 1.3862943611198906 * e.to(tl.float32))

    turn = (angle_word >> 8).to(tl.int32)
    quarter = (turn + 2097152) >> 22
    x = (turn - (quarter << 22)).to(tl.float32) * 4.76837158203125e-07
    y = x * x
    sine = ((-3.587725839827414e-05 * y + 0.002489871967804031) * y - 0.08074536727091274) * y + 0.7853981525427292
    sine = sine * x
    cosine = ((-0.00031888050842583107 * y + 0.015849915256947688) * y - 0.3084242535619725) * y + 0.9999999724233218
    odd = (quarter & 1) == 1
    a, b = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    a = tl.where(((quarter + 1) & 2) == 2, -a, a)
    b = tl.where((quarter & 2) == 2, -b, b)
    return radius * a, radius * b


@triton.jit
def _store(out, weight, offset_out, offset_weight, std, z, mask):
    w = tl.load(weight + offset_weight, mask=mask)
    total = w.to(std.dtype) + std * z.to(std.dtype)
    if out.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)
    tl.store(out + offset_out, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["layer", "first_row", "m"])
def perturb_kernel(
    out, weight, row_std, key, index, layer, first_row, m, n, o0, o1, w0, w1, GATHER: tl.constexpr, ROWS: tl.constexpr
):
    """One program: ROWS rows of one tile. `index` holds the row indices if GATHER, and is not read otherwise."""
    tiles = tl.cdiv(n, TILE)
    i = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) % tiles
    lane = tl.arange(0, LANES)
    if GATHER:  # noqa: SIM108  (a branch of Triton at compile time)
        row = tl.load(index + i, mask=i < m, other=0).to(tl.uint32)
    else:
        row = first_row.to(tl.uint32) + i.to(tl.uint32)
    seed, sample = tl.load(key), tl.load(key + 1)
    zero = tl.zeros((ROWS, LANES), tl.uint32)
    r0, t0, r1, t1 = _philox(
        zero + (tile * LANES + lane).to(tl.uint32)[None, :],
        zero + row[:, None],
        zero + layer.to(tl.uint32),
        zero + sample.to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    z0, z1 = _normals(r0, t0)
    z2, z3 = _normals(r1, t1)

    std = tl.load(row_std + i, mask=i < m, other=0)[:, None]
    i = i.to(tl.int64)[:, None]
    j = (tile * TILE + lane).to(tl.int64)[None, :]
    at_out, at_weight = i * o0 + j * o1, i * w0 + j * w1
    inside = i < m
    _store(out, weight, at_out, at_weight, std, z0, inside & (j < n))
    _store(out, weight, at_out + 16 * o1, at_weight + 16 * w1, std, z1, inside & (j + 16 < n))
    _store(out, weight, at_out + 32 * o1, at_weight + 32 * w1, std, z2, inside & (j + 32 < n))
    _store(out, weight, at_out + 48 * o1, at_weight + 48 * w1, std, z3, inside & (j + 48 < n))


def perturb(
    weight: Tensor,  # (m, n)
    row_std: Tensor,  # (m,)
    key: Tensor,  # (2,) int64
    layer: int,
    out: Tensor,  # (m, n)
    *,
    first_row: int = 0,
    rows: Tensor | None = None,  # (m,) int64
) -> None:
    """Write ``weight + row_std[:, None] * z`` into `out`, for the rows from `first_row` on, or for `rows`.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, or a weight that is too large.
    """
    check_noise(weight, row_std, key, layer, out, first_row, rows)
    m, n = weight.shape
    if m == 0 or n == 0:
        return
    if max(m, n) >= MAX_SIZE:
        raise ValueError(f"weight must have less than {MAX_SIZE} rows and columns for backend 'triton', got {(m, n)}")
    wide = accumulation_dtype(weight.dtype)
    row_std, key = row_std.to(wide).contiguous(), key.contiguous()
    index = key if rows is None else rows.to(torch.int64).contiguous()
    check_memory([("out", out)], [("weight", weight), ("row_std", row_std), ("key", key), ("rows", rows)])
    grid = (triton.cdiv(m, ROWS) * triton.cdiv(n, TILE.value),)
    # Triton launches on the current device
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]  # torch's
        perturb_kernel[grid](
            out, weight, row_std, key, index, _int32(layer), _int32(first_row), m, n, *out.stride(), *weight.stride(),
            GATHER=rows is not None, ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip


def _int32(value: int) -> int:
    """The value modulo 2^32 as a signed 32-bit integer: one argument type, so one compiled kernel, for all values."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)
