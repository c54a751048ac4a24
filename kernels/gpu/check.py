"""`python -m kernels.gpu.check`: compiles every kernel and configuration ahead of time, without a GPU, reads registers,
spills and instructions back from the binaries, and holds them against ceilings. The tables of docs/gpu-kernels.md are its
output."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kernels.gpu.aot import Compiled, compile_launches
from kernels.gpu.bounds import Loop, Loops, attention_bounds, other_bounds, product_bounds
from kernels.gpu.case import Case
from kernels.gpu.cases import ARCHES, all_cases
from kernels.gpu.tuning import SHARED_LIMITS

ASYNC_COPIES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
COUNTED = ("sm_80", "sm_89", "sm_90", "sm_120")
"""Architectures whose instructions per weight are held against ceilings."""


@dataclass(frozen=True, slots=True)
class Looser:
    """A cell whose ceilings are higher than the rule's, and why."""

    instructions: float
    reason: str
    registers: int = 0  # 0: the rule's


def looser(case: Case, arch: str) -> Looser | None:
    """The cells that the rule does not fit."""
    mma_by_warp = arch != "sm_90"
    if case.block_m == 64 and mma_by_warp:
        return Looser(
            0.9,
            "64 rows take one HMMA per weight (16x8x16 tiles): 1.0 of the count is tensor core work; and 64 fp32 sums a thread "
            "with both operands in registers, where Hopper reads one from shared memory: two programs an SM instead of three",
            255,
        )
    if case.block_m in (32, 64) and case.group_size in (32, 64):
        return Looser(0.2, "scales in the loop for each half or quarter of a tile, applied to the weights")
    if case.block_m <= 16 and case.group_size == 64 and arch == "sm_90":
        return Looser(0.1, "four HGMMA groups instead of one, each with its descriptors and its wait")
    return None


def instruction_ceiling(case: Case, arch: str) -> float | None:
    """Instructions per weight in the main loop, for decode-sized row tiles."""
    if case.kernel != "awq_gemm" or case.block_m > 64 or arch not in COUNTED or case.label not in _DECODE_LABELS:
        return None
    ceiling = 2.6 if case.block_m <= 16 else 3.0
    if case.dtype == torch.bfloat16:
        ceiling += 0.3
    if case.group_size == 32:
        ceiling += 0.9
    exception = looser(case, arch)
    return ceiling + exception.instructions if exception else ceiling


_DECODE_LABELS = {f"M<={rows}" for rows in (8, 16, 32, 64)}


def register_ceiling(case: Case, arch: str) -> int | None:
    if instruction_ceiling(case, arch) is None:
        return None
    exception = looser(case, arch)
    if exception and exception.registers:
        return exception.registers
    return 128 if case.block_m <= 16 and case.group_size != 32 else 168


def faults(case: Case, compiled: Compiled) -> list[str]:
    """What the binary breaks, in words; empty when all holds."""
    arch, found = compiled.arch, []
    if compiled.spills:
        found.append(f"{compiled.spills} spills")
    if arch.startswith("sm_") and compiled.count("I2F"):
        found.append(f"{compiled.count('I2F')} integer to float conversions")
    if compiled.shared_nbytes > SHARED_LIMITS[arch]:
        found.append(f"{compiled.shared_nbytes} bytes of shared memory, {arch} has {SHARED_LIMITS[arch]}")
    ceiling, registers = instruction_ceiling(case, arch), register_ceiling(case, arch)
    if ceiling is not None and instructions_per_weight(case, compiled) > ceiling + 0.005:
        found.append(f"{instructions_per_weight(case, compiled):.2f} instructions per weight, ceiling {ceiling:.1f}")
    if registers is not None and compiled.registers > registers:
        found.append(f"{compiled.registers} registers, ceiling {registers}")
    if case.kernel == "awq_gemm" and arch in ASYNC_COPIES and not wide_copies(compiled):
        found.append("weights are not loaded by 128-bit asynchronous copies")
    if case.kernel == "awq_gemm" and arch == "sm_90" and case.block_m >= 64 and not compiled.count("HGMMA"):
        found.append("no HGMMA")
    return found


def instructions_per_weight(case: Case, compiled: Compiled) -> float:
    return compiled.loop_length / case.weights_per_thread if case.weights_per_thread else 0.0


def wide_copies(compiled: Compiled) -> int:
    return sum(number for opcode, number in compiled.loop.items() if opcode.startswith("LDGSTS") and "128" in opcode)


def row(case: Case, compiled: Compiled) -> str:
    """One line of the table."""
    arch = compiled.arch
    group = {-1: "", 0: "K"}.get(case.group_size, str(case.group_size))
    ceiling, per_weight = instruction_ceiling(case, arch), ""
    if case.weights_per_thread and compiled.loop_length:
        per_weight = f"{instructions_per_weight(case, compiled):.2f}" + (f" / {ceiling:.1f}" if ceiling else "")
    exception = looser(case, arch) if ceiling else None
    limit = register_ceiling(case, arch)
    registers = f"{compiled.registers} / {limit}" if limit else str(compiled.registers)
    mma = "HGMMA" if compiled.count("HGMMA") else "HMMA" if compiled.count("HMMA") else ""
    dtype = str(case.dtype).removeprefix("torch.").replace("float16", "fp16").replace("bfp16", "bf16")
    dtype = dtype.replace("float32", "fp32")
    cells = [
        arch, case.kernel, case.label, dtype, group, registers, str(compiled.spills), per_weight,
        str(compiled.count("I2F")) if arch.startswith("sm_") else "", str(wide_copies(compiled) or ""), mma,
        f"{compiled.shared_nbytes / 1024:.0f}", exception.reason if exception else "",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| arch | kernel | case | dtype | group | registers / ceiling | spills | instr/weight / ceiling | I2F | LDGSTS.128 | mma | "
    "shared KiB | why looser |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(slots=True)
class Findings:
    """Of one architecture or several: the table's lines, warp instructions per turn of the main loops, and what is broken."""

    lines: list[str] = field(default_factory=list)
    loops: Loops = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def compile_all(arch: str, short: bool) -> Findings:
    found = Findings()
    cases = list(all_cases(arch, short))
    for case, compiled in zip(cases, compile_launches([case.launch for case in cases], arch), strict=True):
        found.lines.append(row(case, compiled))
        if case.dtype == torch.float16 and compiled.loop_length:
            found.loops[(arch, case.kernel, case.label, case.group_size)] = Loop.of(case.launch, compiled)
        found.broken += [
            f"{arch} {case.kernel} {case.label} {case.dtype} group {case.group_size}: {fault}"
            for fault in faults(case, compiled)
        ]
    return found


def run(arches: list[str], short: bool) -> Findings:
    """Compiles, an architecture per process, and prints."""
    whole = Findings()
    print(HEADER)
    processes = min(len(arches), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(compile_all, arches, [short] * len(arches)):
            print("\n".join(found.lines), flush=True)
            whole.lines += found.lines
            whole.loops |= found.loops
            whole.broken += found.broken
    return whole


MARKERS = ("<!-- begin {} -->", "<!-- end {} -->")


def replace_section(text: str, name: str, body: str) -> str:
    begin, end = (marker.format(name) for marker in MARKERS)
    head, rest = text.split(begin)
    return head + begin + "\n" + body + "\n" + end + rest.split(end)[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.gpu.check", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHES, default=list(ARCHES))
    parser.add_argument("--short", action="store_true", help="one configuration per kernel")
    parser.add_argument("--write", type=Path, help="put the tables between the markers of this page")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    found = run(options.arch, options.short)
    bounds = {
        "bounds": product_bounds(found.loops),
        "attention bounds": attention_bounds(found.loops),
        "other bounds": other_bounds(),
    }
    for table in bounds.values():
        print("\n" + "\n".join(table))
    seconds = time.perf_counter() - started
    if options.write is not None:
        text = options.write.read_text()
        text = replace_section(text, "kernels", f"{len(found.lines)} binaries.\n\n{HEADER}\n" + "\n".join(found.lines))
        for name, table in bounds.items():
            text = replace_section(text, name, "\n".join(table))
        options.write.write_text(text)
    print(f"\n{len(found.lines)} binaries in {seconds:.0f} s; {len(found.broken)} faults")
    for fault in found.broken:
        print("FAULT", fault)
    return 1 if found.broken else 0


if __name__ == "__main__":
    sys.exit(main())
