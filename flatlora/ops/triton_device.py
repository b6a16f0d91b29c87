"""Functions of the Triton kernels: the noise contract, a weight in any of its formats, row sums of a merged weight.

A tile has 64 columns. Lane l of its 16 lanes computes the normals of columns l, 16 + l, 32 + l and 48 + l from one
Philox call, so that each quarter of a tile is loaded and stored contiguously. A program computes a group of TILES tiles
at a time.

Logarithm, sine and cosine are the polynomials of `csrc/noise_kernel.h`: the fast hardware functions exceed the error of
1e-5 that the contract allows where u is close to 1, and the polynomials give the same result in Triton's interpreter.
"""

# The functions under @triton.jit are compiled, not run: their parameters are values of Triton, which have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LANES, TILE = tl.constexpr(16), tl.constexpr(64)
SMALLEST = tl.constexpr(2.0**-102)  # see `norms.SMALLEST`
COLUMNS = tl.constexpr(128)  # of a merged row that are in registers at a time
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 words. A 64-bit product is one instruction; its low and high halves would be two."""
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def normals(radius_word, angle_word):
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
def is_inside(j, n):
    """0 <= j < n of an int32 j in one comparison."""
    return j.to(tl.uint32) < n


@triton.jit
def four_bit_scale(e, scales, outer_codes, outer_scales, offset, mask, SIZE: tl.constexpr, OUTER: tl.constexpr):
    """The scale of element e: blocks of 2^SIZE elements have one, which OUTER >= 0 stores in 8 bits."""
    block = e >> SIZE
    scale = tl.load(scales + block, mask=mask, other=0)
    if OUTER >= 0:
        scale = tl.load(outer_codes + scale.to(tl.int32)) * tl.load(outer_scales + (block >> OUTER), mask=mask, other=0)
        scale = tl.where(mask, scale + tl.load(offset), 0.0)  # elements outside of the weight are zero
    return scale


@triton.jit
def load_weight(
    weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
    i, j, pair, m, n, SIZE: tl.constexpr, OUTER: tl.constexpr, PAIRED: tl.constexpr, ROUND: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """Elements (i, j) of the weight, (rows, columns), zero outside of it.

    SIZE < 0 means a dense weight. Otherwise `weight` holds two 4-bit codes in a byte, the first one in the high bits;
    `w0` is the length of a stored row, and the number is rounded to the dtype ROUND, as a dequantized weight is. PAIRED
    promises that the columns are those of `pair` and their successors, all even, and loads each byte once.
    """
    rows = (first_stored + i).to(tl.int64)[:, None] * w0
    if SIZE < 0:
        inside = (i < m)[:, None] & is_inside(j, n)[None, :]
        value = tl.load(weight + (rows + j.to(tl.int64)[None, :] * w1), mask=inside, other=0, eviction_policy=EVICT)
    else:
        column = pair if PAIRED else j
        e = rows + column.to(tl.int64)[None, :]
        inside = (i < m)[:, None] & is_inside(column, n)[None, :]
        byte = tl.load(weight + (e >> 1), mask=inside, other=0, eviction_policy=EVICT).to(tl.int32)
        scale = four_bit_scale(e, scales, outer_codes, outer_scales, offset, inside, SIZE, OUTER)
        if PAIRED:
            value = tl.interleave(tl.load(codes + (byte >> 4)) * scale, tl.load(codes + (byte & 15)) * scale)
        else:
            value = tl.load(codes + ((byte >> (4 - 4 * (e & 1).to(tl.int32))) & 15)) * scale
        value = value.to(ROUND)
    return value


@triton.jit
def store_sum(out, o0, o1, i, j, m, n, w, std, z):
    """Write w + std z, rounded once, at (i, j)."""
    total = w.to(std.dtype) + std * z.to(std.dtype)
    if out.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)
    at = i.to(tl.int64)[:, None] * o0 + j.to(tl.int64)[None, :] * o1
    inside = (i < m)[:, None] & is_inside(j, n)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def perturb_tiles(
    out, o0, o1, weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
    std, key, row, layer, first_tile, group, shift, i, m, n,
    ROWS: tl.constexpr, TILES: tl.constexpr, SIZE: tl.constexpr, OUTER: tl.constexpr, PAIRED: tl.constexpr,
    ROUND: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Write W + std z of rows i in the tiles of this group. `row` is the index of each row in the noise contract."""
    lane, half = tl.arange(0, LANES * TILES), tl.arange(0, LANES * TILES // 2)
    tile = group * TILES
    seed, sample = tl.load(key), tl.load(key + 1)
    zero = tl.zeros((ROWS, LANES * TILES), tl.uint32)
    r0, t0, r1, t1 = philox(
        zero + ((first_tile + tile) * LANES + lane).to(tl.uint32)[None, :],
        zero + row[:, None],
        zero + layer.to(tl.uint32),
        zero + sample.to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    z0, z1 = normals(r0, t0)
    z2, z3 = normals(r1, t1)
    start = tile * TILE - shift
    j = start + lane // LANES * TILE + lane % LANES
    pair = start + half // (LANES // 2) * TILE + half % (LANES // 2) * 2
    for q in tl.static_range(4):
        w = load_weight(
            weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
            i, j + 16 * q, pair + 16 * q, m, n, SIZE, OUTER, PAIRED, ROUND, EVICT,
        )  # fmt: skip
        z = z0 if q == 0 else z1 if q == 1 else z2 if q == 2 else z3
        store_sum(out, o0, o1, i, j + 16 * q, m, n, w, std[:, None], z)


@triton.jit
def load_ranks(B, b0, A, a0, i, j, first, r, m, n, RANKS: tl.constexpr):
    """Ranks `first`, `first` + 1, ... of the factors: B, (rows, RANKS), and A, (RANKS, columns)."""
    k = first + tl.arange(0, RANKS)
    at_B, at_A = i.to(tl.int64)[:, None] * b0 + k[None, :], k.to(tl.int64)[:, None] * a0 + j[None, :]
    b = tl.load(B + at_B, mask=(i < m)[:, None] & (k < r)[None, :], other=0)
    a = tl.load(A + at_A, mask=(k < r)[:, None] & is_inside(j, n)[None, :], other=0, eviction_policy="evict_last")
    return b.to(tl.float32), a.to(tl.float32)


@triton.jit
def squared_rows(
    weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
    B, b0, A, a0, scaling, factor, i, r, m, n, RANKS: tl.constexpr, CHUNKED: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, OUTER: tl.constexpr, PAIRED: tl.constexpr, ROUND: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """``||factor_i (W + s B A)_i||^2``, (ROWS,); without the factor unless SCALED.

    COLUMNS of the merged rows are in registers at a time. The product is that of the tensor cores with float32
    accuracy (each operand as a sum of two tf32 numbers).
    """
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    j, pair = tl.arange(0, COLUMNS), 2 * tl.arange(0, COLUMNS // 2)
    if SIZE < 0:
        w = load_weight(
            weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
            i, j, pair, m, n, SIZE, OUTER, PAIRED, ROUND, "evict_last",
        )  # fmt: skip
    for first in range(0, n, COLUMNS):
        if SIZE < 0:  # load the next columns before the product, which hides the latency of the memory
            merged, following = w.to(tl.float32), first + COLUMNS
            w = load_weight(
                weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
                i, j + following, pair + following, m, n, SIZE, OUTER, PAIRED, ROUND, "evict_last",
            )  # fmt: skip
        else:  # what decoding needs, would not fit into the registers beside the product
            merged = load_weight(
                weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
                i, j + first, pair + first, m, n, SIZE, OUTER, PAIRED, ROUND, "evict_last",
            ).to(tl.float32)  # fmt: skip
        if CHUNKED:
            for rank in range(0, r, RANKS):
                b, a = load_ranks(B, b0, A, a0, i, j + first, rank, r, m, n, RANKS)
                merged = tl.dot(b * scaling, a, merged, input_precision="tf32x3")
        else:  # B stays where it is from one block of columns to the next
            b, a = load_ranks(B, b0, A, a0, i, j + first, 0, r, m, n, RANKS)
            merged = tl.dot(b * scaling, a, merged, input_precision="tf32x3")
        if SCALED:
            merged = merged * factor[:, None]
        total += merged * merged
    return tl.sum(total, axis=1)


@triton.jit
def merged_norms(
    weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
    B, b0, A, a0, scaling, i, r, m, n, RANKS: tl.constexpr, CHUNKED: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, OUTER: tl.constexpr, PAIRED: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """``||(W + s B A)_i||``, (ROWS,). Rows whose squares are out of the range of float32 are scaled by 2^100 or 2^-100.

    That is rare, and costs another pass over W where it happens.
    """
    squared = squared_rows(
        weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
        B, b0, A, a0, scaling, scaling, i, r, m, n, RANKS, CHUNKED, ROWS, SIZE, OUTER, PAIRED, ROUND, False,
    )  # fmt: skip
    norm = tl.sqrt(squared)
    small, large = squared < n * SMALLEST, ~(squared <= LARGEST)
    if tl.max(((small | large) & (i < m)).to(tl.int32), axis=0) > 0:
        factor = tl.where(small, 2.0**100, tl.where(large, 2.0**-100, 1.0))
        squared = squared_rows(
            weight, w0, w1, first_stored, codes, scales, outer_codes, outer_scales, offset,
            B, b0, A, a0, scaling, factor, i, r, m, n, RANKS, CHUNKED, ROWS, SIZE, OUTER, PAIRED, ROUND, True,
        )  # fmt: skip
        norm = tl.where(small | large, tl.sqrt(squared) / factor, norm)
    return norm
