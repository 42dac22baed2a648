"""Buffers that a worker uses again for every chunk: fresh ones would cost page faults (docs/performance.md)."""

from __future__ import annotations

import math

import torch

WORK = "work"
"""Name of the one buffer that everybody may use within a call. What a scheme leaves in it the check overwrites: fewer
buffers in turn stay in the cache, which is worth a twentieth of a run's time."""


class Scratch:
    """Named buffers of one worker. Not shared between threads."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, str | torch.device], torch.Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, str | torch.device], torch.Tensor] = {}
        self._read: dict[str, tuple[torch.Tensor, memoryview]] = {}

    def take(
        self, name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """A contiguous tensor of undefined content, valid until the same name is taken again."""
        key = (name, dtype, device)
        view = self._views.get(key)
        if view is not None and view.shape == shape:  # chunks of one tensor have one shape: making a view takes 2 us
            return view
        numel = math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
        view = self._views[key] = buffer[:numel].view(shape)
        return view

    def take_to_read(
        self, name: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype
    ) -> tuple[torch.Tensor, memoryview]:
        """As :meth:`take`, with its memory to read a file into. What a name is taken with shares one buffer."""
        found = self._read.get(name)
        if found is None or found[0].shape != shape or found[0].dtype != dtype:
            data = self.take(name, (math.prod(shape) * dtype.itemsize,), torch.uint8)
            found = self._read[name] = (data.view(dtype).view(shape), data.numpy().data)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values())
