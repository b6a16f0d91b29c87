"""The noise contract and its reference implementation in plain torch.

z = N(seed, sample, layer, i, j) is a pure function of five integers, computed with the counter-based generator
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) and the Box-Muller transform:

    key      = (low word, high word) of the 64-bit seed, with the data-parallel rank mixed in (`mix_rank`)
    counter  = (column block, row i, layer, sample)                 four 32-bit words
    words    = Philox4x32-10(counter, key) = (w0, w1, w2, w3)
    u_k      = ((w_k >> 8) + 1/2) * 2^-24      in (0, 1)            k = 0, 2
    t_k      = 2 pi * (w_k >> 8) * 2^-24                            k = 1, 3
    z_0, z_1 = sqrt(-2 ln u_0) * (cos t_1, sin t_1)
    z_2, z_3 = sqrt(-2 ln u_2) * (cos t_3, sin t_3)

Columns are assigned in tiles of 64, so that a vector unit of up to 16 lanes stores its results contiguously: column
j = 64*tile + 16*q + lane takes z_q of column block 16*tile + lane.

Rows and columns are those of the whole weight: a part of it, such as a shard, has that part of the noise.

All backends that follow the contract produce the same words bit for bit and the same normals within 1e-5.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LANES, TILE = 16, 64  # lanes of a column block group, columns of a tile
WORD = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF

Words4 = tuple[Any, Any, Any, Any]  # Any: ints and int64 tensors, also mixed


def mix_rank(seed: int, rank: int) -> int:
    """The seed of one data-parallel rank: ``seed XOR rank * golden ratio`` modulo 2^64, as a signed 64-bit integer.

    Rank 0 has the seed itself; for one seed, different ranks have different keys.
    """
    mixed = (seed ^ (rank * 0x9E3779B97F4A7C15)) & MASK64
    return mixed - (1 << 64) if mixed >> 63 else mixed


def philox4x32(counter: Words4, key: tuple[Any, Any]) -> Words4:
    """Philox4x32-10 of four counter words and two key words.

    Args:
        counter, key: ints, or int64 tensors that broadcast.

    Returns:
        Four output words, each in [0, 2^32), of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 wraps modulo 2^64, so the low word is correct, and the mask removes the sign bits that >> shifts in
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def words(seed: int, sample: int, layer: int, rows: Tensor, columns: int, first_column: int = 0) -> Tensor:
    """The random words from which the normals of the given rows are computed.

    Args:
        seed, sample, layer: of the noise stream; sample and layer are taken modulo 2^32.
        rows: (m,) int64, row indices of the whole weight.
        columns: n.
        first_column: index of the first of these columns in the whole weight. The words are those of whole tiles.

    Returns:
        (m, blocks, 4) int64 in [0, 2^32), blocks = 16 * (number of tiles that contain one of the columns).
    """
    first, last = first_column // TILE, math.ceil((first_column + columns) / TILE)
    blocks = torch.arange(LANES * first, LANES * last, dtype=torch.int64, device=rows.device)
    counter = (blocks[None, :], rows[:, None].to(torch.int64) & WORD, layer & WORD, sample & WORD)
    key = (seed & WORD, (seed >> 32) & WORD)
    found = torch.broadcast_tensors(*philox4x32(counter, key))  # type: ignore[no-untyped-call]  # torch's
    return torch.stack(found, dim=-1)


def normals(seed: int, sample: int, layer: int, rows: Tensor, columns: int, first_column: int = 0) -> Tensor:
    """The standard normals of the given rows, computed in float64 by definition and rounded once.

    Args:
        seed, sample, layer, rows, columns, first_column: see `words`.

    Returns:
        (m, n) float32.
    """
    bits = (words(seed, sample, layer, rows, columns, first_column) >> 8).to(torch.float64)
    radius = torch.sqrt(-2 * torch.log((bits[..., 0::2] + 0.5) * 2.0**-24))  # (m, blocks, 2)
    angle = (2 * math.pi * 2.0**-24) * bits[..., 1::2]
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)  # (m, blocks, pair, cos/sin)
    z = z.reshape(len(rows), bits.shape[1] // LANES, LANES, 4)
    tiles = z.transpose(2, 3)  # (m, tile, q, lane), the order of the columns
    before = first_column % TILE  # columns of the first tile
    return tiles.flatten(1)[:, before : before + columns].float().contiguous()
