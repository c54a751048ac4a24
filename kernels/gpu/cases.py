"""Every kernel in every configuration that the shape policy picks, as launches on tensors without data: what the checks
compile."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.gpu.case import Case
from kernels.gpu.gemm_cases import gemm_cases
from kernels.gpu.step_cases import attention_cases, other_cases

ARCHES = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_120", "gfx942")


def all_cases(arch: str, short: bool = False) -> Iterator[Case]:
    yield from gemm_cases(arch, short)
    yield from attention_cases(arch, short)
    yield from other_cases(arch, short)
