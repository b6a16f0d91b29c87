"""Block sizes of the Triton kernels: a short list for each, of which the fastest is chosen at the first large weight.

No bit of a result depends on the choice: the sums of `MERGED` are in an order that rows and warps would change, so that
these are the same in all of them. Where nothing can be timed (a small weight, a CUDA graph that is captured,
the interpreter) it is the first of the list.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch


def register_limit(four_bit: bool, ranks: int = 16) -> dict[str, int]:
    """The option of a launch that limits its registers."""
    return {"maxnreg": MOST_REGISTERS} if four_bit and ranks <= 16 and torch.version.hip is None else {}


class BlockSize(NamedTuple):
    """How the work is divided.

    Attributes:
        rows: of a program.
        tiles: of 64 columns that a program computes at a time.
        warps: of a program.
    """

    rows: int
    tiles: int
    warps: int


NOISE = (BlockSize(32, 1, 4), BlockSize(16, 4, 8), BlockSize(16, 2, 4), BlockSize(64, 1, 8))
MERGED = (BlockSize(16, 4, 8), BlockSize(16, 8, 8))  # 16 rows are those of a tensor core
# Registers of a thread that decodes 4-bit weights, for ranks up to 16: two programs of eight warps have as many.
# Without it, NVIDIA's assembler spills a few for sm_80 to have room for three. AMD's compiler has no such option.
MOST_REGISTERS = 128
TUNED_FROM = 1 << 20  # weights: compiling the others takes longer than a small weight can win
REPEATS = 5

_chosen: dict[Hashable, BlockSize] = {}


def seconds_on_gpu(run: Callable[[], None]) -> float:
    """The shortest of some runs, after one that compiles. It synchronizes."""
    run()
    times: list[float] = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)


def choose(
    sizes: tuple[BlockSize, ...],
    problem: Hashable,
    weights: int,
    device: torch.device,
    run: Callable[[BlockSize], None],
    seconds: Callable[[Callable[[], None]], float] = seconds_on_gpu,
) -> BlockSize:
    """The fastest of some block sizes for a problem, timed once in a process.

    Args:
        sizes: to choose from; the first is the fallback.
        problem: what the choice depends on: kernel, shape, dtypes.
        weights: number of weights of the problem.
        device: of the weights.
        run: runs the kernel with a block size. Its result must not depend on how often it is called.
        seconds: of a run.
    """
    if weights < TUNED_FROM or device.type != "cuda":
        return sizes[0]
    key = (sizes, problem, device)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return sizes[0]
        _chosen[key] = min(sizes, key=lambda size: seconds(lambda: run(size)))
    return _chosen[key]
