"""Estimates: the least time that a kernel takes on a chip, by each of the chip's limits. Instruction counts are the binaries',
peaks the vendors'; latencies are in none of it."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.gpu.aot import Compiled
from kernels.gpu.launch import Launch
from kernels.gpu.tuning import CHIPS, Chip

_HEAD_DIM, _HEADS, _KV_HEADS = 128, 32, 8  # Llama-3.1-8B's, for attention and the rest
_HIDDEN, _INTERMEDIATE, _VOCABULARY = 4096, 14336, 128256
_PREFILL_KEYS = 4096


@dataclass(frozen=True, slots=True)
class Loop:
    """The main loop of one binary: warp instructions that all warps of a program issue per turn, and its tile."""

    warp_instructions: int
    rows: int  # of attention: query rows
    keys: int

    @classmethod
    def of(cls, launch: Launch, compiled: Compiled) -> Loop:
        constants = launch.constants
        return cls(compiled.loop_length * launch.num_warps, constants.get("ROWS", 0), constants.get("KEYS", 0))


Loops = dict[tuple[str, str, str, int], Loop]
"""By architecture, kernel, case and group size (-1 for what has none), fp16."""


def microseconds(chip: Chip, nbytes: float, warp_instructions: float, operations: float) -> dict[str, float]:
    """Memory: bytes at the chip's bandwidth. Issue: four warp instructions a clock and multiprocessor. Tensor cores: two
    operations per multiply-add at the dense peak."""
    return {
        "memory": nbytes / (chip.memory_gb_per_second * 1e3),
        "issue": warp_instructions / (chip.num_sms * 4 * chip.clock_ghz * 1e3),
        "tensor": operations / (chip.tensor_tflops * 1e6),
    }


def _line(cells: list[str], times: dict[str, float]) -> str:
    longest = max(times, key=lambda name: times[name])
    return "| " + " | ".join([*cells, *(f"{value:.3g}" for value in times.values()), longest]) + " |"


def _counted_chips() -> list[Chip]:
    """Those whose binaries' loops are read: NVIDIA's with tensor cores that Triton reaches."""
    return [chip for chip in CHIPS.values() if chip.arch.startswith("sm_") and chip.arch != "sm_75"]


def _loop_of(loops: Loops, chip: Chip, kernel: str, label: str, group_size: int = -1) -> Loop | None:
    key = (kernel, label, group_size)
    return loops.get((chip.arch, *key)) or loops.get(("sm_80", *key))


def product_bounds(loops: Loops, group_size: int = 128) -> list[str]:
    """A million weights: 4 bits each and a word per group, and two operations per weight and row."""
    lines = ["| chip | M | instr/weight | memory us | issue us | tensor us | bound |", "|---|---|---|---|---|---|---|"]
    for chip in _counted_chips():
        for rows in (8, 16, 32, 64, 128):
            loop = _loop_of(loops, chip, "awq_gemm", f"M<={rows}", group_size)
            if loop is None:
                continue
            per_weight = loop.warp_instructions * 32 / (128 * 128)
            times = microseconds(
                chip, 1e6 * (4 + 32 / group_size) / 8, 1e6 * loop.warp_instructions / (128 * 128), 2e6 * rows
            )
            lines.append(_line([chip.name, str(rows), f"{per_weight:.2f}"], times))
    return lines


def attention_bounds(loops: Loops) -> list[str]:
    """Decode: a million keys and values of one KV head, which a program reads once for its group of query heads. Prefill: a
    thousand tokens of one KV head's group over 4096 keys each; memory is one read of the keys per tile of rows, from L2."""
    group, lines = _HEADS // _KV_HEADS, []
    lines += ["| chip | kernel | cache | memory us | issue us | tensor us | bound |", "|---|---|---|---|---|---|---|"]
    for chip in _counted_chips():
        for cache, nbytes in (("fp16", 4 * _HEAD_DIM), ("int8", 2 * _HEAD_DIM + 8)):
            label = f"D {_HEAD_DIM}" + (", int8" if cache == "int8" else "")
            decode = _loop_of(loops, chip, "attention_decode", label)
            prefill = _loop_of(loops, chip, "attention_prefill", label)
            if decode is None or prefill is None:
                continue
            turns = 1e6 / decode.keys
            times = microseconds(
                chip, 1e6 * nbytes, turns * decode.warp_instructions, turns * decode.keys * decode.rows * 4 * _HEAD_DIM
            )
            lines.append(_line([chip.name, "decode", cache], times))
            tiles = 1000 / (prefill.rows // group)
            turns = tiles * _PREFILL_KEYS / prefill.keys
            operations = turns * prefill.rows * prefill.keys * 4 * _HEAD_DIM
            times = microseconds(chip, _PREFILL_KEYS * nbytes, turns * prefill.warp_instructions, operations)
            lines.append(_line([chip.name, "prefill", cache], times))
    return lines


def other_bounds() -> list[str]:
    """Bytes that a row reads and writes, and the microseconds of 64 rows on every chip; memory is the only limit."""
    kernels = {
        "embed": 4 * _HIDDEN,
        "add_rms_norm": (2 + 4 + 4 + 2) * _HIDDEN,
        "rope_and_store": 2 * 2 * (_HEADS + 2 * _KV_HEADS) * _HEAD_DIM,
        "act_and_mul": 3 * 2 * _INTERMEDIATE,
        "gather_rows": 2 * (2 + 4) * _HIDDEN,
        "sample, greedy": 4 * _VOCABULARY,
        "adjust_logits": (4 + 4 + 4) * _VOCABULARY + _VOCABULARY // 8,
        "lm_head, 16 bit, shared by the rows": 2 * _HIDDEN * _VOCABULARY // 64,
    }
    lines = [
        "| kernel | bytes a row | " + " | ".join(chip.name for chip in CHIPS.values()) + " |",
        "|---|---|" + "---|" * len(CHIPS),
    ]
    for name, nbytes in kernels.items():
        times = [64 * nbytes / (chip.memory_gb_per_second * 1e3) for chip in CHIPS.values()]
        lines.append(f"| {name} | {nbytes} | " + " | ".join(f"{value:.3g}" for value in times) + " |")
    return lines
