"""What a captured CUDA graph reads at replay: the key of the noise and rho_t, in tensors that are written in place.

While a graph is captured, layers use these tensors instead of numbers and of keys that are never written again. No
kernel of a forward or a backward then depends on a value that the host knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.arguments import integer
from .noise_stream import NoiseStream
from .schedule import Schedule

MOST_SAMPLES = 1 << 16


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of this device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class GraphTensors:
    """The noise of captured CUDA graphs, `perturbation(model).graph`.

        noise = flatlora.perturbation(model)
        ...                               # some training steps, as every capture needs
        noise.graph.prepare(device)
        with torch.cuda.graph(graph):
            loss = model(**batch).loss
            loss.backward()
        for step in range(steps):
            noise.graph.update()          # the next sample, and rho_t of this step
            graph.replay()
            optimizer.step()

    An optimizer step inside of the graph is not counted when it is replayed: call ``noise.set_step(step)`` before
    `update` then.
    """

    def __init__(self, noise: NoiseStream, schedule: Schedule) -> None:
        self._noise, self._schedule = noise, schedule
        self._keys: dict[torch.device, list[Tensor]] = {}  # of consecutive samples
        self._rhos: dict[tuple[torch.device, str], Tensor] = {}  # rho_t by adapter
        self._first = 0  # sample of the first key

    @torch.no_grad()
    def prepare(self, device: torch.device | str | int, samples: int = 1) -> None:
        """Allocate the tensors for captures on this device.

        Args:
            device: of the layers.
            samples: number of noise samples in one graph: with `resample="forward"`, of its backward passes.

        Raises:
            RuntimeError: a capture is running, or the backend of this device reads the key on the host.
        """
        device = torch.empty(0, device=device).device  # with its index
        samples = integer("samples", samples, 1, MOST_SAMPLES)
        if is_capturing(device):
            raise RuntimeError("graph.prepare must be called before the capture, got a stream that is capturing")
        if device.type == "cuda" and self._noise.backend(device) != "triton":
            raise RuntimeError(
                f"a CUDA graph needs noise that is made without the host, and backend {self._noise.backend(device)!r} "
                f"on {device} reads its key there: install triton and use backend='auto'"
            )
        keys = self._keys.setdefault(device, [])
        keys += [torch.empty(2, dtype=torch.int64, device=device) for _ in range(samples - len(keys))]
        for name in self._schedule.rhos:
            if (device, name) not in self._rhos:
                self._rhos[device, name] = torch.empty((), dtype=torch.float32, device=device)
        self._write()

    def update(self) -> None:
        """Before a replay: go to the next sample, and write it and rho_t where captured graphs read them.

        With `resample="step"` the sample is the number of optimizer steps; otherwise it follows the last one of the
        replay before. Nothing is synchronized.
        """
        if not self._keys:
            raise RuntimeError("no graph has been prepared: call graph.prepare(device) before the capture")
        if not self._noise.by_steps:
            self._noise.sample = max(self._noise.sample, self._first + max(map(len, self._keys.values())) - 1) + 1
        self._noise.sample_used = False
        self._write()

    def key(self, device: torch.device, sample: int) -> Tensor:
        """The key of this sample, for a layer whose forward is captured."""
        keys, index = self._keys.get(device, []), sample - self._first
        if not 0 <= index < len(keys):
            raise RuntimeError(
                f"a CUDA graph is being captured and sample {index + 1} of it has no memory on {device}: call "
                f"flatlora.perturbation(model).graph.prepare(device, samples=...) right before the capture, got "
                f"samples={len(keys)}"
            )
        return keys[index]

    def rho_t(self, device: torch.device, adapter: str) -> Tensor:
        """rho_t of this adapter, () float32, for a layer whose forward is captured."""
        return self._rhos[device, adapter]

    @torch.no_grad()
    def _write(self) -> None:
        self._first, seed, ramp = self._noise.sample, self._noise.mixed_seed(), self._schedule.ramp
        for keys in self._keys.values():
            for index, key in enumerate(keys):
                key[0], key[1] = seed, (self._first + index) & 0xFFFFFFFF  # two fills need no copy from the host
        for (_, name), rho_t in self._rhos.items():
            rho_t.fill_(self._schedule.rhos.get(name, 0.0) * ramp)
