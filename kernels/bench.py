"""`python -m kernels.bench`: the native CPU linears per shape and number of rows, against what this machine can do at most.

Each line gives the best time of many (other processes only ever add to it), multiply-accumulates per cycle and core, the rate at
which weights are read, both as a share of the machine's measured peaks, and torch's fp32 product on as many threads. The peaks: the
densest integer loop over registers (AVX2: vpmaddubsw and vpaddw), and reading memory with all threads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.format import AwqWeight, DenseWeight, pack_int4

if TYPE_CHECKING:
    from kernels.cpu._native import ThreadPool
    from kernels.cpu.linear import CpuLinear


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    out_features: int
    in_features: int
    kind: str = "awq"
    group_size: int = 128


SHAPES = {
    "cache": [
        Shape("in cache, g128", 256, 1024, group_size=128),
        Shape("in cache, g64", 256, 1024, group_size=64),
        Shape("in cache, g32", 256, 1024, group_size=32),
        Shape("in cache, g-1", 256, 1024, group_size=1024),
        Shape("in cache, fp16", 256, 512, kind="dense"),
    ],
    "smollm2-135m": [
        Shape("qkv", 960, 576, group_size=64),
        Shape("o", 576, 576, group_size=64),
        Shape("gate_up", 3072, 576, group_size=64),
        Shape("down", 576, 1536, group_size=64),
        Shape("lm_head int8", 49152, 576, kind="int8"),
        Shape("lm_head int4", 49152, 576, kind="int4"),
    ],
    "llama-3.2-1b": [
        Shape("qkv", 3072, 2048),
        Shape("o", 2048, 2048),
        Shape("gate_up", 16384, 2048),
        Shape("down", 2048, 8192),
        Shape("lm_head int8", 128256, 2048, kind="int8"),
    ],
}


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of this machine, per core where they are; 0 where unknown."""

    isa: str
    clock_hz: float
    integer_macs: float
    read_bytes: float
    threads: int


@dataclass(frozen=True, slots=True)
class Result:
    shape: str
    kind: str
    out_features: int
    in_features: int
    group_size: int
    rows: int
    seconds: float
    macs_per_cycle_and_core: float
    share_of_integer_peak: float
    weight_bytes_per_second: float
    share_of_read_peak: float
    torch_fp32_seconds: float


def best_time(run: Callable[[], object], seconds: float, calls_inside: int = 1) -> float:
    """The shortest of many runs over `seconds`, per call inside."""
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best / calls_inside


def measure_peaks(threads: int, bandwidth_nbytes: int) -> tuple[Peaks, ThreadPool]:
    from kernels.cpu import _native

    pool = _native.ThreadPool(threads)
    buffer = torch.ones(bandwidth_nbytes, dtype=torch.uint8)
    peaks = Peaks(
        isa=_native.current_isa(),
        clock_hz=_native.measure_clock(0.3),
        integer_macs=_native.measure_integer_peak(0.3),
        read_bytes=_native.measure_read_bandwidth(pool, buffer, 1.5),
        threads=threads,
    )
    return peaks, pool


def make_linear(shape: Shape, activations: str) -> CpuLinear:
    """Random weights of this shape, packed."""
    from kernels.cpu.linear import pack_head, pack_linear

    columns, k = shape.out_features, shape.in_features
    if shape.kind == "awq":
        groups = k // shape.group_size
        weight = AwqWeight(
            shape.name,
            pack_int4(torch.randint(0, 16, (k, columns), dtype=torch.uint8)),
            pack_int4(torch.randint(0, 16, (groups, columns), dtype=torch.uint8)),
            (0.001 + 0.01 * torch.rand(groups, columns)).half(),
            shape.group_size,
        )
        return pack_linear([weight], None, activations)
    dense = DenseWeight(shape.name, torch.randn(columns, k).half())
    if shape.kind == "dense":
        return pack_linear([dense], None, activations)
    return pack_head(dense, shape.kind, activations)


def measure(
    shape: Shape, all_rows: list[int], activations: str, peaks: Peaks, pool: ThreadPool, seconds: float
) -> list[Result]:
    from kernels.cpu import _native

    linear = make_linear(shape, activations)
    macs, results = shape.out_features * shape.in_features, []
    dense = torch.randn(shape.out_features, shape.in_features)
    for rows in all_rows:
        x = torch.randn(rows, shape.in_features)
        # Recorded often enough that the call from Python does not count.
        calls = max(1, min(64, int(2e7 / (macs * rows))))
        program = _native.Program(pool)
        inputs: list[Tensor] = []
        packing = _native.Program(pool)
        for part in linear.parts:
            inputs.append(torch.empty(part.activations.nbytes(rows), dtype=torch.uint8))
            packing.quantize(x, [(part.activations, inputs[-1])])
        packing.run(rows)
        y = torch.empty(rows, shape.out_features)
        for _ in range(calls):
            program.linear(linear.parts, inputs, y)
        best = best_time(lambda program=program, rows=rows: program.run(rows), seconds, calls)  # type: ignore[misc]
        per_core = macs * rows / best / peaks.threads
        results.append(
            Result(
                shape=shape.name,
                kind=shape.kind,
                out_features=shape.out_features,
                in_features=shape.in_features,
                group_size=shape.group_size,
                rows=rows,
                seconds=best,
                macs_per_cycle_and_core=per_core / peaks.clock_hz if peaks.clock_hz else 0.0,
                share_of_integer_peak=per_core / peaks.integer_macs if peaks.integer_macs else 0.0,
                weight_bytes_per_second=linear.nbytes / best,
                share_of_read_peak=linear.nbytes / best / peaks.read_bytes,
                torch_fp32_seconds=best_time(lambda x=x: torch.nn.functional.linear(x, dense), seconds / 2),  # type: ignore[misc]
            )
        )
    return results


def show(result: Result) -> str:
    return (
        f"{result.shape:<16}{result.kind:<6}{result.out_features:>7} x{result.in_features:>6}{result.rows:>6}"
        f"{result.seconds * 1e6:>12.1f}{result.macs_per_cycle_and_core:>10.1f}{100 * result.share_of_integer_peak:>7.0f}%"
        f"{result.weight_bytes_per_second / 1e9:>9.1f}{100 * result.share_of_read_peak:>7.0f}%"
        f"{result.torch_fp32_seconds / result.seconds:>9.1f} x"
    )


def take_device(arguments: list[str]) -> tuple[str, list[str]]:
    """`--device cpu|cuda`, and the other arguments: each device has options of its own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    known, rest = parser.parse_known_args(arguments)
    return known.device, rest


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="cuda has options of its own: see --device cuda --help"
    )
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["cache", "smollm2-135m"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 512], metavar="M")
    parser.add_argument("--activations", choices=["int8", "int16"], default="int8")
    parser.add_argument("--threads", type=int, default=0, help="0: the physical cores this process may use")
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on each line")
    parser.add_argument(
        "--bandwidth-mb", type=int, default=1024, help="size of the buffer that read bandwidth is measured on"
    )
    options = parser.parse_args(arguments)
    for name, value in (
        ("--rows", min(options.rows)),
        ("--seconds", options.seconds),
        ("--bandwidth-mb", options.bandwidth_mb),
    ):
        if value <= 0:
            parser.error(f"{name}: expected more than 0, found {value}")
    if options.threads < 0:
        parser.error(f"--threads: expected 0 or more, found {options.threads}")
    return options


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    device, rest = take_device(arguments)
    if device == "cuda":
        from kernels.gpu.bench import main as gpu_main

        return gpu_main(rest)
    options = parse_arguments(rest)
    try:
        from kernels.cpu import _native  # noqa: F401
        from kernels.cpu.threads import usable_cores
    except ImportError as error:
        print(f"kernels.bench: the native CPU kernels are not built ({error})", file=sys.stderr)
        return 1
    threads = options.threads or usable_cores()[0]
    torch.set_num_threads(threads)
    peaks, pool = measure_peaks(threads, options.bandwidth_mb << 20)
    per_cycle = peaks.integer_macs / peaks.clock_hz if peaks.clock_hz else 0.0
    print(
        f"{peaks.isa}, {threads} threads, {peaks.clock_hz / 1e9:.2f} GHz, integer peak {peaks.integer_macs / 1e9:.0f} GMAC/s "
        f"({per_cycle:.1f} per cycle) and core, reads {peaks.read_bytes / 1e9:.1f} GB/s; activations {options.activations}"
    )
    print(
        f"{'shape':<16}{'kind':<6}{'N x K':>15}{'M':>6}{'us':>12}{'MAC/cycle':>10}{'peak':>8}{'GB/s':>9}{'peak':>8}{'to torch':>11}"
    )
    results: list[Result] = []
    for group in options.shapes:
        for shape in SHAPES[group]:
            for result in measure(shape, options.rows, options.activations, peaks, pool, options.seconds):
                results.append(result)
                print(show(result), flush=True)
    print(
        json.dumps(
            {"peaks": asdict(peaks), "activations": options.activations, "results": [asdict(r) for r in results]}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
