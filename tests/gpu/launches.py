"""What launches have in common that compile to one kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kernels.gpu import launch as launching
from kernels.gpu.launch import Launch


def compiled_form(start: Launch) -> tuple[Any, ...]:
    """What Triton compiles a kernel for: constants, types, and of each argument whether it is None, 1 or a multiple of 16.
    Memory is taken to start at a multiple of 16, as the allocator has it."""
    forms: list[Any] = []
    for parameter, arg in zip(start.kernel.arg_names, start.args, strict=False):
        if isinstance(arg, Tensor):
            forms.append((arg.dtype, arg.storage_offset() * arg.dtype.itemsize % 16 == 0))
        elif isinstance(arg, int) and parameter not in NOT_SPECIALIZED:
            forms.append((arg == 1, arg % 16 == 0))
        else:
            forms.append(arg if arg is None else type(arg))
    return (name_of(start), *forms, *sorted(start.constants.items()), start.num_warps, start.num_stages)


NOT_SPECIALIZED = {"num_rows", "window", "table_stride", "num_segments", "size"}
"""Arguments that the kernels mark so; `test_marks_of_arguments` compares."""


def name_of(start: Launch) -> str:
    return start.kernel.fn.__name__


@contextmanager
def recorded(found: list[Launch]) -> Iterator[None]:
    """Appends every launch to `found`, on its way to where it goes without."""
    onward = launching._starter if launching.is_intercepted() else lambda start: None

    def starter(start: Launch) -> None:
        found.append(start)
        onward(start)

    with launching.intercept(starter):
        yield
