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
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.gpu.aot import Compiled, compile_launch
from kernels.gpu.case import Case
from kernels.gpu.cases import ARCHES, all_cases
from kernels.gpu.tuning import CHIPS, SHARED_LIMITS, Chip

ASYNC_COPIES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
COUNTED = ("sm_80", "sm_89", "sm_90", "sm_120")
"""Architectures whose instructions per weight are held against ceilings."""


@dataclass(frozen=True, slots=True)
class Looser:
    """A cell whose ceiling is higher than the rule's, and why."""

    instructions: float
    reason: str


def looser(case: Case, arch: str) -> Looser | None:
    """The cells that the rule does not fit."""
    mma_by_warp = arch != "sm_90"
    if case.block_m == 64 and mma_by_warp:
        return Looser(0.9, "64 rows take one HMMA per weight (16x8x16 tiles): 1.0 of the count is tensor core work")
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
    if case.block_m == 64:
        return 255  # 64 fp32 sums a thread, and their operands: nothing of it spills
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
    mma = "HGMMA" if compiled.count("HGMMA") else "HMMA" if compiled.count("HMMA") else ""
    dtype = str(case.dtype).removeprefix("torch.").replace("float16", "fp16").replace("bfp16", "bf16")
    dtype = dtype.replace("float32", "fp32")
    cells = [
        arch, case.kernel, case.label, dtype, group, str(compiled.registers), str(compiled.spills), per_weight,
        str(compiled.count("I2F")) if arch.startswith("sm_") else "", str(wide_copies(compiled) or ""), mma,
        f"{compiled.shared_nbytes / 1024:.0f}", exception.reason if exception else "",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| arch | kernel | case | dtype | group | registers | spills | instr/weight / ceiling | I2F | LDGSTS.128 | mma | "
    "shared KiB | why looser |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def compile_all(arch: str, short: bool) -> tuple[list[str], list[str]]:
    """The table's lines of one architecture, and the faults."""
    lines, broken = [], []
    for case in all_cases(arch, short):
        compiled = compile_launch(case.launch, arch)
        lines.append(row(case, compiled))
        broken += [
            f"{arch} {case.kernel} {case.label} {case.dtype} group {case.group_size}: {fault}"
            for fault in faults(case, compiled)
        ]
    return lines, broken


def run(arches: list[str], short: bool, out: list[str]) -> list[str]:
    """Compiles, an architecture per process, and prints; appends the table's lines to `out`. Returns the faults."""
    broken = []
    print(HEADER)
    processes = min(len(arches), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for lines, found in pool.map(compile_all, arches, [short] * len(arches)):
            print("\n".join(lines), flush=True)
            out += lines
            broken += found
    return broken


def bound(chip: Chip, per_weight: float, group_size: int, rows: int) -> dict[str, float]:
    """Microseconds that a million weights take at least, by each limit of the chip. Memory: 4 bits and a word per group.
    Issue: four warps a clock and multiprocessor. Tensor cores: two operations per weight and row."""
    bits = 4 + (32 / group_size if group_size else 0)
    return {
        "memory": 1e6 * bits / 8 / (chip.memory_gb_per_second * 1e9) * 1e6,
        "issue": 1e6 * per_weight / (chip.num_sms * 128 * chip.clock_ghz * 1e9) * 1e6,
        "tensor": 1e6 * 2 * rows / (chip.tensor_tflops * 1e12) * 1e6,
    }


def bounds_table(per_weight: dict[tuple[str, int], float]) -> list[str]:
    """Per chip and row tile: the three times of a million weights, fp16, group 128, and which is longest."""
    lines = ["| chip | M | instr/weight | memory us | issue us | tensor us | bound |", "|---|---|---|---|---|---|---|"]
    for chip in CHIPS.values():
        for rows in (8, 16, 32, 64, 128):
            count = per_weight.get((chip.arch, rows)) or per_weight.get(("sm_80", rows))
            if count is None or not chip.arch.startswith("sm_") or chip.arch == "sm_75":
                continue
            times = bound(chip, count, 128, rows)
            longest = max(times, key=lambda name: times[name])
            cells = [chip.name, str(rows), f"{count:.2f}", *(f"{value:.3f}" for value in times.values()), longest]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def counts_from(lines: list[str]) -> dict[tuple[str, int], float]:
    """(arch, rows) to instructions per weight, of the table's fp16 rows at group 128."""
    counts = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[1] == "awq_gemm" and cells[2].startswith("M<=") and cells[3:5] == ["fp16", "128"] and cells[7]:
            counts[(cells[0], int(cells[2][3:]))] = float(cells[7].split(" / ")[0])
    return counts


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
    started, lines = time.perf_counter(), []  # type: float, list[str]
    broken = run(options.arch, options.short, lines)
    bounds = bounds_table(counts_from(lines))
    print("\n" + "\n".join(bounds))
    seconds = time.perf_counter() - started
    if options.write is not None:
        text = options.write.read_text()
        text = replace_section(text, "kernels", f"{len(lines)} binaries.\n\n{HEADER}\n" + "\n".join(lines))
        options.write.write_text(replace_section(text, "bounds", "\n".join(bounds)))
    print(f"\n{len(lines)} binaries in {seconds:.0f} s; {len(broken)} faults")
    for fault in broken:
        print("FAULT", fault)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
