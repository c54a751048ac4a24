"""How much memory, disk and time a quantization will take, before it starts."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from quantizer.calibrate import BATCH_TOKENS
from quantizer.config import EFFORTS, QuantizeError, QuantizeOptions
from quantizer.device import CPU, wait_for
from quantizer.mappings import Architecture
from quantizer.pipeline import MAX_ROUNDED_ROWS
from quantizer.refinement import MAX_REFINED_WEIGHTS
from quantizer.rounding import WIDEST_IN_FP64
from quantizer.work_folder import reusable_bytes

PROCESS_BYTES = 850_000_000
"""Python, torch and transformers, before any tensor."""
COLUMN_OPERATIONS = 10
"""Of rounding with feedback on a column, and of a sweep of refinement."""
EFFICIENCY = 0.5
"""What the work reaches of the rate of one large matmul, as measured on a model of 135 million parameters."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes and seconds; memory, the host's, is `fixed` and what every calibration sequence adds."""

    fixed_bytes: int
    bytes_per_sample: int
    num_samples: int
    disk_bytes: int
    seconds: float
    device_bytes: int = 0
    """Of a GPU's memory, where one computes."""

    @property
    def memory_bytes(self) -> int:
        return self.fixed_bytes + self.num_samples * self.bytes_per_sample

    def to_dict(self) -> dict[str, float]:
        """What the report says."""
        memory = {"memory_bytes": self.memory_bytes, "device_bytes": self.device_bytes}
        return {"seconds": round(self.seconds, 1), **memory}


def estimate(
    architecture: Architecture,
    options: QuantizeOptions,
    shapes: Mapping[str, tuple[int, ...]],
    model: PretrainedConfig,
    num_samples: int,
    operations_per_second: float,
    launch_seconds: float = 0.0,
    on_host: bool = True,
) -> Estimate:
    """shapes: of every tensor of the dense model. All layers are taken to be like the first of the largest.

    launch_seconds: of an operation that does next to nothing, on a GPU. on_host: computed in the host's memory, not in a GPU's.
    """
    num_layers = model.num_hidden_layers
    layers = [_groups(architecture, shapes, model, index) for index in range(num_layers)]
    groups = max(layers, key=lambda groups: sum(rows * columns for rows, columns in groups))
    layer = sum(rows * columns for rows, columns in groups)
    is_mixture = architecture.mixture is not None
    others = [math.prod(shape) for name, shape in shapes.items() if not name.startswith(f"{architecture.layers}.")]
    hidden_size, tokens = groups[0][1], num_samples * options.sequence_length
    # Of experts' inputs one at a time exists.
    moments = sum(columns**2 for _, columns in groups[: len(architecture.groups) - is_mixture])
    moments += max(columns**2 for _, columns in groups) if is_mixture else 0
    forward = 4 * BATCH_TOKENS * (4 * max(rows for rows, _ in groups) + 8 * hidden_size)
    # transformers' layer has a copy of the experts; what they read is kept until the last is calibrated.
    capture = 4 * (layer * (2 if is_mixture else 1) + moments) + forward
    # Original and folded layer, and what one group of linears takes. At the end the dequantized layer beside the two.
    widest = max(_rounding_bytes(options, min(rows, MAX_ROUNDED_ROWS), columns) for rows, columns in groups)
    rounding = 4 * (2 * layer + moments) + widest
    computing = max(capture, rounding, 12 * layer)
    # Beside a GPU the host holds a tensor outside of the layers, or a finished layer of which all may have been left in 16 bits.
    held = max(8 * max(others), computing if on_host else 4 * layer)
    packed = num_layers * layer * (4 + 20 / options.group_size if options.group_size > 0 else 4) / 8 + 2 * sum(others)
    operations = num_layers * _layer_operations(options, groups, layer, tokens)
    launches = num_layers * _layer_launches(options, groups)
    return Estimate(
        fixed_bytes=PROCESS_BYTES + held,
        # Read by one layer, written by it, and a byte of each of its values tested; what a mixture's experts read.
        bytes_per_sample=(13 if is_mixture else 9) * options.sequence_length * hidden_size,
        num_samples=num_samples,
        # Finished parts, and the checkpoint made of them; the hidden states that enter the next layer, twice while replaced.
        disk_bytes=int(2 * packed + 8 * tokens * hidden_size),
        seconds=operations / (EFFICIENCY * operations_per_second) + launches * launch_seconds,
        device_bytes=0 if on_host else computing,
    )


def _rounding_bytes(options: QuantizeOptions, rows: int, columns: int) -> int:
    """Of linears that share an input, while they are rounded and refined.

    Rounding: the second moment as it is factored, in fp64 and then in fp32 as well or in fp32 alone, and the columns as they are
    updated. Refining: the weights, the integers before and after, and the state of the rows in hand.
    """
    feedback = (12 if columns <= WIDEST_IN_FP64 else 4) * columns**2 + 12 * rows * columns
    if not EFFORTS[options.effort].sweeps:
        return feedback
    return max(feedback, 6 * rows * columns + 16 * min(rows * columns, MAX_REFINED_WEIGHTS))


def _groups(
    architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], model: PretrainedConfig, index: int
) -> list[tuple[int, int]]:
    """Rows and columns of a layer's linears that share an input."""
    prefix, groups = architecture.layer_prefix(index), []
    for group in architecture.layer_groups(model, index):
        linears = [shapes[f"{prefix}{name}.weight"] for name in group.linears]
        groups.append((sum(rows for rows, _ in linears), linears[0][1]))
    return groups


def _layer_operations(options: QuantizeOptions, groups: list[tuple[int, int]], layer: int, tokens: int) -> float:
    """Additions and multiplications in one layer. groups: rows and columns of the linears that share an input."""
    effort = EFFORTS[options.effort]
    hidden_size = groups[0][1]
    total = 2 * tokens * (2 * layer + 4 * options.sequence_length * hidden_size)  # two passes
    for rows, columns in groups:
        total += 2 * tokens * columns**2 + 10 * rows * columns**2  # the moment, and errors for the report
        if options.scales:
            total += 2 * (2 * effort.exponent_steps + 5) * min(rows, effort.search_rows) * columns**2
        if options.rounding == "feedback":
            total += (1 + 4 * effort.sweeps) * rows * columns**2 + 4 * columns**3
    return float(total)


def _layer_launches(options: QuantizeOptions, groups: list[tuple[int, int]]) -> int:
    """Operations in one layer that are small however large the layer is: the ones on a single column."""
    effort = EFFORTS[options.effort]
    per_column = COLUMN_OPERATIONS * (1 + effort.sweeps) if options.rounding == "feedback" else 0
    return per_column * sum(columns for _, columns in groups)


def measured_rate(device: torch.device = CPU) -> float:
    """Additions and multiplications per second of an fp32 matmul, the best of a few."""
    size = 1024 if device.type == "cpu" else 2048
    matrix = torch.ones(size, size, device=device)
    return 2 * size**3 / _fastest(lambda: matrix @ matrix, device)


def measured_launch(device: torch.device) -> float:
    """Seconds of an operation on a few values on a GPU, one of many; 0 on the CPU, where EFFICIENCY has it."""
    if device.type == "cpu":
        return 0.0
    values, repetitions = torch.zeros(8, device=device), 200

    def run() -> None:
        for _ in range(repetitions):
            values.add_(1.0)

    return _fastest(run, device) / repetitions


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done it, the best of a few."""
    fastest = math.inf
    for _ in range(4):
        wait_for(device)
        started = time.perf_counter()
        work()
        wait_for(device)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def check_fits(
    needed: Estimate, available_bytes: int, free_disk_bytes: int, folder: Path, device_bytes: int | None = None
) -> None:
    """QuantizeError if memory or disk will not do; it says what would. device_bytes: free in the memory of a GPU that computes."""
    if needed.disk_bytes > free_disk_bytes:
        raise QuantizeError(
            f"{folder}: needs about {_gigabytes(needed.disk_bytes)} of disk, {_gigabytes(free_disk_bytes)} are free"
        )
    if device_bytes is not None and needed.device_bytes > device_bytes:
        raise QuantizeError(
            f"needs about {_gigabytes(needed.device_bytes)} of the GPU's memory, {_gigabytes(device_bytes)} are free; "
            f"--device cpu computes in the host's; --no-memory-check tries all the same"
        )
    if needed.memory_bytes <= available_bytes:
        return
    message = (
        f"needs about {_gigabytes(needed.memory_bytes)} of memory, {_gigabytes(available_bytes)} are available; "
        f"--no-memory-check tries all the same"
    )
    fitting = (available_bytes - needed.fixed_bytes) // needed.bytes_per_sample
    if fitting >= 1:
        raise QuantizeError(f"{message}; --samples {fitting} would fit")
    raise QuantizeError(
        f"{message}; no number of samples would fit: one layer alone takes {_gigabytes(needed.fixed_bytes)}"
    )


def free_disk_bytes(out: Path) -> int:
    """Free space where OUT is to be, with what an interrupted run has taken of it already."""
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    return shutil.disk_usage(existing).free + reusable_bytes(out)


def available_memory() -> int:
    """Bytes this process may take, with what it has: the control group's limit where there is one, else the host's memory."""
    own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    host = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return own + host
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached file pages are given back before anything fails.
        return own + min(host, int(limit) - used + int(statistics["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return own + host


def describe(needed: Estimate) -> str:
    minutes = needed.seconds / 60
    duration = f"{minutes:.0f} min" if minutes >= 2 else f"{needed.seconds:.0f} s"
    on_device = f"{_gigabytes(needed.device_bytes)} of the GPU's, " if needed.device_bytes else ""
    return (
        f"about {_gigabytes(needed.memory_bytes)} of memory, {on_device}{_gigabytes(needed.disk_bytes)} of disk and {duration} "
        f"for {needed.num_samples} calibration sequences"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
