"""The noise of a model: seed, data-parallel rank, current sample, and the key that the kernels read."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import resolve_backend
from ..ops.blocks import unwatched
from ..ops.philox import mix_rank
from ..utils.arguments import INT64, SEED, Checked, integer
from ..utils.copying import PartlyCopied
from .data_parallel import check_shares_noise, data_parallel_rank


class NoiseStream(PartlyCopied):
    """``z(seed, rank, sample, layer, i, j)``: which seed, rank and sample come next.

    Args:
        seed: 64-bit integer; None for torch's initial seed, which is read and not used up.
        resample: "forward" for a new sample after each backward, "step" for one sample per optimizer step.
        backend: name of the noise backend.
    """

    sample: int = Checked(integer, 0, INT64)
    seed: int = Checked(integer, *SEED)
    not_copied: ClassVar[frozenset[str]] = frozenset({"_key", "mesh", "_checked"})

    def __init__(self, seed: int | None, resample: str, backend: str) -> None:
        self.seed = torch.initial_seed() if seed is None else seed
        self.sample = 0
        self.sample_used = False  # a backward has used the sample: the next training forward takes a new one
        self.by_steps = resample == "step"
        self._backend = backend
        self._rank: int | None = None
        self._start()

    def _start(self) -> None:
        self._key: tuple[tuple[object, ...], Tensor] | None = None  # the last key; a key is never written again
        self.mesh: Any = None  # device mesh of the model, see `data_parallel.mesh_of`
        self._checked: Any = None  # a mesh whose processes share their noise

    @property
    def rank(self) -> int:
        return data_parallel_rank(self.mesh) if self._rank is None else self._rank

    @rank.setter
    def rank(self, value: int | None) -> None:
        self._rank = integer("rank", value, 0, 2**32 - 1, optional=True)

    def check_shared(self, mesh: Any) -> None:
        """Check that the processes of this mesh, over which a weight is split, have the same noise.

        Raises:
            RuntimeError: nothing says that they share a batch.
        """
        if self._rank is None and mesh is not self._checked:
            check_shares_noise(self.mesh, mesh)
            self._checked = mesh

    def mixed_seed(self) -> int:
        """The seed with the rank mixed in."""
        return mix_rank(self.seed, self.rank)

    def key(self, device: torch.device, seed: int, sample: int) -> Tensor:
        """The int64 tensor (seed with the rank mixed in, sample), where the backend of `device` reads it."""
        source = (seed, sample & 0xFFFFFFFF, device, torch.is_inference_mode_enabled())
        known = self._key
        if known is None or known[0] != source:
            where = device if self.backend(device) == "triton" else "cpu"
            with unwatched():
                key = torch.empty(2, dtype=torch.int64, device=where)
                # two fills need no copy from the host
                key[0], key[1] = source[0], source[1]
            known = self._key = source, key
        return known[1]

    def backend(self, device: torch.device) -> str:
        """Name of the backend that makes the noise on this device."""
        return resolve_backend(self._backend, device)

    def on_backward(self) -> None:
        """The backward of a perturbed layer runs: the sample is used."""
        if not self.by_steps:
            self.sample_used = True

    def take_new_sample(self) -> None:
        """Go to the next sample if this one is used."""
        if self.sample_used:
            self.sample, self.sample_used = self.sample + 1, False
