"""The one place where kernels are started, so that checks can look at every launch without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel start: `args` in the kernel's order, `constants` by name, `grid` of one to three sizes."""

    kernel: Any  # triton.JITFunction, or its interpreted stand-in
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def _start(launch: Launch) -> None:
    options: dict[str, Any] = {}
    if launch.max_registers is not None and torch.version.hip is None:
        options["maxnreg"] = launch.max_registers
    launch.kernel[launch.grid](
        *launch.args,
        **launch.constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
        **options,
    )


_starter: Callable[[Launch], None] = _start


def launch(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    max_registers: int | None = None,
    **constants: Any,
) -> None:
    """Starts `kernel` on the current stream. An empty grid starts nothing."""
    if all(size > 0 for size in grid):
        _starter(Launch(kernel, tuple(grid), args, constants, num_warps, num_stages, max_registers))


@contextmanager
def intercept(starter: Callable[[Launch], None]) -> Iterator[None]:
    """Within the context every launch goes to `starter` instead of the GPU."""
    global _starter
    previous, _starter = _starter, starter
    try:
        yield
    finally:
        _starter = previous


def is_intercepted() -> bool:
    return _starter is not _start
