"""Which kernel configuration runs for which shape: pure functions of a chip and a shape, over small tables.

Nothing here queries a device. `Chip` comes from `kernels.gpu.device` when serving, from `CHIPS` in checks and estimates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Chip:
    """What the policy needs of a GPU. Peaks are the vendor's, dense, for estimates only."""

    name: str
    arch: str  # "sm_90", "gfx942", ...
    num_sms: int
    clock_ghz: float
    memory_gb_per_second: float
    tensor_tflops: float  # fp16 or bf16 in, fp32 accumulated
    shared_nbytes: int  # most that one program may take


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("T4", "sm_75", 40, 1.59, 320, 65, 64 << 10),
        Chip("A100-80GB", "sm_80", 108, 1.41, 2039, 312, 163 << 10),
        Chip("A10", "sm_86", 72, 1.695, 600, 125, 99 << 10),
        Chip("L4", "sm_89", 58, 2.04, 300, 121, 99 << 10),
        Chip("RTX-4090", "sm_89", 128, 2.52, 1008, 165, 99 << 10),
        Chip("H100-SXM", "sm_90", 132, 1.83, 3350, 989, 227 << 10),
        Chip("H200", "sm_90", 132, 1.83, 4800, 989, 227 << 10),
        Chip("RTX-PRO-6000", "sm_120", 188, 2.6, 1792, 500, 99 << 10),
        Chip("MI300X", "gfx942", 304, 2.1, 5300, 1307, 64 << 10),
    )
}

SHARED_LIMITS = {chip.arch: chip.shared_nbytes for chip in CHIPS.values()}

DECODE_ROWS = (8, 16, 32, 64)
"""Row tiles of the regimes that stream weights; above the last, tiles of 128 rows."""


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """How one quantized product runs. K is summed in `num_parts` parts, each by a program of its own when `split`."""

    block_m: int
    num_parts: int = 1
    split: bool = True
    scale_after: bool = True
    num_warps: int = 4
    num_stages: int = 4
    max_registers: int | None = None
    dequantize: bool = False  # the weight is expanded to 16 bit first, and the product is the library's

    @property
    def uses_workspace(self) -> bool:
        return self.num_parts > 1 and self.split and not self.dequantize

    def partials(self, num_rows: int, out_features: int) -> int:
        """fp32 values of workspace."""
        if not self.uses_workspace:
            return 0
        return self.tiles(num_rows, out_features) * self.num_parts * 128 * self.block_m

    def arrivals(self, num_rows: int, out_features: int) -> int:
        """int32 counters of workspace, one per tile of the output."""
        return self.tiles(num_rows, out_features) if self.uses_workspace else 0

    def tiles(self, num_rows: int, out_features: int) -> int:
        return -(-num_rows // self.block_m) * -(-out_features // 128)


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Tiles of the two attention kernels."""

    key_block: int  # keys per turn of the loop
    rows: int  # query rows (tokens times heads of a group) of a prefill tile
    prefill_warps: int
    decode_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class _Architecture:
    """One row of the shipped table."""

    stages: dict[int, int]  # pipeline stages by row tile
    scale_after_rows: dict[
        int, int
    ]  # by group class (32, 64, 128): row tiles up to which scales are applied after the dot
    dequantize_rows: int  # from how many rows on the weight is expanded first
    programs_per_sm: int  # programs in flight that keep memory busy


_AMPERE = _Architecture({8: 4, 16: 4, 32: 4, 64: 3, 128: 3}, {32: 16, 64: 16, 128: 32}, 512, 3)
_TABLE = {
    # Triton has no tensor core path for Turing: few rows run on the FP32 units, with 16 warps to hold the tile; more than that
    # are the library's, which has one.
    "sm_75": _Architecture({16: 1}, {32: 16, 64: 16, 128: 16}, 17, 2),
    "sm_80": _AMPERE,
    "sm_86": _AMPERE,
    "sm_89": _AMPERE,
    "sm_90": _Architecture({8: 4, 16: 4, 32: 4, 64: 4, 128: 3}, {32: 16, 64: 16, 128: 32}, 1024, 3),
    "sm_120": _AMPERE,
    "gfx942": _Architecture({8: 2, 16: 2, 32: 2, 64: 2}, {32: 16, 64: 16, 128: 32}, 512, 2),
}


def _entry(chip: Chip) -> _Architecture:
    """Of an architecture that the table lacks, its maker's with the least shared memory."""
    return _TABLE.get(chip.arch, _TABLE["gfx942"] if chip.arch.startswith("gfx") else _AMPERE)


BATCH_INVARIANT_ROWS = 64
"""The one row tile of --batch-invariant."""

_MIN_TILES_PER_PART = 4
"""K tiles (of 128) that a part has at least: fewer would not fill the pipeline."""


def gemm_config(
    chip: Chip,
    num_rows: int,
    out_features: int,
    in_features: int,
    group_size: int,
    batch_invariant: bool = False,
) -> GemmConfig:
    """The configuration for x [num_rows, K] times W [N, K] quantized in groups of `group_size` (0: one group over K).

    With `batch_invariant`, partition of K, placement of scales and matrix instruction are functions of N, K and the chip
    alone; whether the parts of K are computed side by side or in turn does not change their sum.
    """
    entry = _entry(chip)
    if batch_invariant:
        return _invariant_config(chip, entry, num_rows, out_features, in_features)
    if num_rows >= entry.dequantize_rows:
        return GemmConfig(128, dequantize=True)
    block_m = next((rows for rows in entry.stages if num_rows <= rows), max(entry.stages))
    tiles = GemmConfig(block_m).tiles(num_rows, out_features)
    if chip.arch == "sm_75":
        return turing_config(_num_parts(chip, entry, tiles, in_features))
    return GemmConfig(
        block_m=block_m,
        num_parts=_num_parts(chip, entry, tiles, in_features),
        scale_after=block_m <= entry.scale_after_rows[_group_class(group_size)],
        num_warps=_num_warps(chip, block_m),
        num_stages=entry.stages[block_m],
        max_registers=_max_registers(block_m, group_size),
    )


def turing_config(num_parts: int) -> GemmConfig:
    """The tile of up to 16 rows. 16 warps have 128 registers each; the code after a loop over all of K wants more."""
    return GemmConfig(16, num_parts, num_warps=16 if num_parts > 1 else 8, num_stages=1)


def expert_config(
    chip: Chip, num_rows: int, num_experts: int, group_size: int, batch_invariant: bool = False
) -> GemmConfig:
    """For rows spread over experts: the tile that the mean expert fills, K never split (experts are many programs). With
    `batch_invariant` the same tile, and scales on the weight, for any number of rows."""
    entry = _entry(chip)
    if chip.arch == "sm_75":
        return GemmConfig(16, num_warps=16, num_stages=1)
    mean = -(-num_rows // num_experts)
    block_m = next((rows for rows in DECODE_ROWS[1:] if mean <= rows), 64)
    if batch_invariant:
        block_m = BATCH_INVARIANT_ROWS
    return GemmConfig(
        block_m,
        num_warps=_num_warps(chip, block_m),
        scale_after=not batch_invariant and block_m <= entry.scale_after_rows[_group_class(group_size)],
        num_stages=entry.stages[block_m],
        max_registers=_max_registers(block_m, group_size),
    )


def _invariant_config(
    chip: Chip, entry: _Architecture, num_rows: int, out_features: int, in_features: int
) -> GemmConfig:
    if chip.arch == "sm_75":
        tiles = GemmConfig(16).tiles(1, out_features)
        parts = _num_parts(chip, entry, tiles, in_features)
        return GemmConfig(16, parts, num_rows <= 32, num_warps=16, num_stages=1)
    block_m = BATCH_INVARIANT_ROWS
    num_parts = _num_parts(chip, entry, GemmConfig(block_m).tiles(1, out_features), in_features)
    split = num_rows <= 2 * block_m
    config = GemmConfig(
        block_m, num_parts, split, False, num_warps=_num_warps(chip, block_m), num_stages=entry.stages[block_m]
    )
    # 255 says to the compiler that registers are there: left to itself it spills a few for more programs.
    return config if split else replace(config, num_warps=8, max_registers=255)


def _num_warps(chip: Chip, block_m: int) -> int:
    """More where four warps could not hold the tile: on AMD, whose vector registers are fewer for their width, from 64 rows."""
    return 8 if block_m == 128 or (chip.arch.startswith("gfx") and block_m == 64) else 4


def _group_class(group_size: int) -> int:
    if group_size == 0 or group_size % 128 == 0:
        return 128
    return 64 if group_size == 64 else 32


def _max_registers(block_m: int, group_size: int) -> int | None:
    """Caps that keep four (three) programs on an SM; the compiler meets them without spilling."""
    if block_m <= 16 and _group_class(group_size) >= 64:
        return 128
    return 168 if block_m <= 32 else None


def _num_parts(chip: Chip, entry: _Architecture, tiles: int, in_features: int) -> int:
    """Parts of K so that tiles * parts fill the chip, each of equal length but the last."""
    num_k = -(-in_features // 128)
    wanted = -(-entry.programs_per_sm * chip.num_sms // tiles)
    parts = max(1, min(wanted, num_k // _MIN_TILES_PER_PART))
    return -(-num_k // -(-num_k // parts))


MAX_SEGMENTS = 128
"""Most segments that a sequence's keys are split into."""
MAX_PARTIAL_ROWS = 8192
"""Most segments over all sequences: with `MAX_SEGMENTS` it bounds the decode kernel's workspace, which has a row of all heads
for each."""


def attention_segment(
    chip: Chip, num_sequences: int, num_kv_heads: int, max_keys: int, batch_invariant: bool = False
) -> int:
    """Keys per segment of decoding, a multiple of 64: short where few sequences must fill the chip. With `batch_invariant`
    num_sequences is to be the most there can be."""
    least = 256
    if not batch_invariant:
        programs_wanted = 4 * chip.num_sms
        least = max(128, min(1024, max_keys * num_sequences * num_kv_heads // programs_wanted))
    segments = min(MAX_SEGMENTS, max(1, MAX_PARTIAL_ROWS // num_sequences))
    return -(-max(least, -(-max_keys // segments)) // 64) * 64


def attention_config(chip: Chip, head_dim: int, group: int, segmented: bool, int8: bool) -> AttentionConfig:
    """As many rows and keys as registers hold, beside the second sum that segments need, or int8 being widened."""
    wide = head_dim > 64
    least_rows = 1 << (group - 1).bit_length()
    if chip.arch == "sm_75":  # no tensor cores through Triton: small tiles
        prefill_warps = (
            16 if wide and not (segmented and head_dim > 128) else 8
        )  # 16 have 128 registers each, 8 have 255
        return AttentionConfig(16, max(16, least_rows), prefill_warps, 8, 1)
    if chip.arch.startswith("gfx"):
        return AttentionConfig(32, max(32, least_rows), 4 if wide and int8 else 8, 4, 1)
    rows = 64
    if head_dim > 128 or (chip.arch != "sm_90" and wide and (segmented or int8)):
        rows = 32
    elif chip.arch != "sm_90" and segmented and int8:
        rows = 16
    key_block = 64 if head_dim <= 128 else 32
    decode_warps = 8 if head_dim > 128 or (wide and int8) else 4
    return AttentionConfig(key_block, max(rows, least_rows), 8 if wide or int8 or segmented else 4, decode_warps, 2)


def graph_buckets(max_sequences: int) -> list[int]:
    """Batch sizes that a captured graph exists for, ascending: powers of two, then eights, then sixteens."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_sequences + 32, 32)]
    return sorted({min(size, max_sequences) for size in sizes if size < max_sequences} | {max_sequences})


@functools.lru_cache(maxsize=4096)
def graph_bucket(num_sequences: int, max_sequences: int) -> int:
    """The smallest bucket that holds so many sequences."""
    return next(size for size in graph_buckets(max_sequences) if size >= num_sequences)


def regimes(configs: Callable[[int], Hashable], max_rows: int) -> list[int]:
    """Row counts up to max_rows that between them meet every value of `configs`, which changes at multiples of 8 alone, or one
    after: what must run once so that nothing is compiled later."""
    tried: dict[Hashable, int] = {}
    for rows in sorted({*range(1, max_rows + 1, 8), *range(8, max_rows + 1, 8), max_rows}):
        tried.setdefault(configs(rows), rows)
    return sorted(tried.values())


def dense_tile(chip: Chip) -> tuple[int, int]:
    """Rows (and depth) of a tile and warps of the batch invariant dense product."""
    return (16, 8) if chip.arch == "sm_75" else (64, 4)
