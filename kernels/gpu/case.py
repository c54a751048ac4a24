"""A launch on tensors without data, to be compiled and held against ceilings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gpu.launch import Launch, intercept
from kernels.gpu.tuning import CHIPS, Chip


@dataclass(frozen=True, slots=True)
class Case:
    """One launch and what it is, for the table and its ceilings."""

    kernel: str
    label: str
    launch: Launch
    dtype: torch.dtype
    group_size: int = -1  # of quantized products; 0 is one group over K
    block_m: int = 0

    @property
    def weights_per_thread(self) -> float:
        """Weights that one thread unpacks in one turn of the main loop; 0 for kernels that unpack none."""
        return 128 * 128 / (32 * self.launch.num_warps) if self.block_m else 0.0


def chip_of(arch: str) -> Chip:
    """The chip of this architecture with the most to lose: the one with the fastest memory."""
    return max((chip for chip in CHIPS.values() if chip.arch == arch), key=lambda chip: chip.memory_gb_per_second)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(run: Callable[[], None]) -> list[Launch]:
    """What `run` would start."""
    found: list[Launch] = []
    with intercept(found.append):
        run()
    return found


def dtypes_of(arch: str) -> tuple[torch.dtype, ...]:
    """16-bit types that the architecture computes in."""
    return (torch.float16,) if arch == "sm_75" else (torch.float16, torch.bfloat16)
