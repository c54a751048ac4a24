"""Memory of recorded programs and of the KV pool."""

from __future__ import annotations

import math
import mmap
import weakref

import torch
from torch import Tensor


class BufferPool:
    """Buffers of one recording. A tensor handed out gives its memory back when the last reference to it goes, so that an op
    recorded later may write there: within a program, ops run in the order recorded."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []  # all ever made: a program keeps them for its life
        self._free: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._take(nbytes)
        tensor = buffer[:nbytes].view(dtype).view(shape)
        weakref.finalize(tensor, self._free.append, buffer).atexit = False
        return tensor

    def _take(self, nbytes: int) -> Tensor:
        fitting = [i for i, buffer in enumerate(self._free) if buffer.nbytes >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes))
        buffer = map_zeros((-(-nbytes // 64) * 64,), torch.uint8)
        self.buffers.append(buffer)
        return buffer


def map_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only once written: a pool is often far larger than what a service comes to use."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.zeros(shape, dtype=dtype)
    region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= 1 << 22:
        region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=dtype).view(shape)
