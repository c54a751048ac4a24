"""Every kernel in every configuration that the shape policy picks, as launches on tensors without data: what the checks
compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.gpu import attention, awq_gemm, fused, sampling
from kernels.gpu.awq_gemm import PackedAwq
from kernels.gpu.launch import Launch, intercept
from kernels.gpu.tuning import CHIPS, Chip, GemmConfig, attention_config, dense_tile, expert_config, gemm_config

ARCHES = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_120", "gfx942")
GROUP_SIZES = (128, 64, 32, 0)
GEMM_ROWS = (8, 16, 32, 64, 128)
HEAD_DIMS = (64, 80, 96, 128, 256)
_N = _K = 4096


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


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(run: Callable[[], None]) -> list[Launch]:
    """What `run` would start."""
    found: list[Launch] = []
    with intercept(found.append):
        run()
    return found


def _packed(group_size: int, n: int = _N, k: int = _K, experts: int = 0) -> PackedAwq:
    lead = (experts,) if experts else ()
    num_n, num_k = -(-n // 128), -(-k // 128)
    groups = 1 if group_size == 0 else num_k * 128 // group_size
    return PackedAwq(
        _meta(*lead, num_n, num_k, 128, 32, dtype=torch.int16),
        _meta(*lead, num_n, groups, 128, dtype=torch.int32),
        n,
        k,
        group_size,
        False,
        experts,
    )


def gemm_launch(
    dtype: torch.dtype, group_size: int, config: GemmConfig, rows: int, use_ptx: bool, n: int = _N, k: int = _K
) -> Launch:
    x, out = _meta(rows, k, dtype=dtype), _meta(rows, n, dtype=dtype)
    partials = _meta(max(1, config.partials(rows, n)), dtype=torch.float32)
    arrivals = _meta(config.tiles(rows, n), dtype=torch.int32)
    packed = _packed(group_size, n, k)
    return launches(lambda: awq_gemm.gemm(x, packed, None, out, partials, arrivals, config, use_ptx))[0]


def gemm_cases(arch: str, short: bool = False) -> Iterator[Case]:
    """The quantized product: every regime, group size and dtype. Short: fp16 and bf16 at group 128, one regime of the
    others."""
    chip, use_ptx = chip_of(arch), arch.startswith("sm_")
    dtypes = (torch.float16,) if arch == "sm_75" else (torch.float16, torch.bfloat16)
    for dtype in dtypes:
        for group_size in GROUP_SIZES:
            for rows in GEMM_ROWS:
                if short and not (rows == 16 and (dtype == torch.float16 or group_size == 128)):
                    continue
                config = gemm_config(chip, rows, _N, _K, group_size)
                if config.dequantize or (config.block_m != rows and rows < 128):
                    continue  # not a tile of this architecture
                launch = gemm_launch(dtype, group_size, config, rows, use_ptx)
                yield Case("awq_gemm", f"M<={rows}", launch, dtype, group_size, config.block_m)
    if short:
        return
    for dtype in dtypes:
        for label, rows, k in (
            ("batch invariant", 64, _K),
            ("batch invariant, long", 4096, _K),
            ("ragged K", 16, 4000),
        ):
            config = gemm_config(chip, rows, _N, k, 0 if k % 128 else 128, batch_invariant="invariant" in label)
            launch = gemm_launch(dtype, 0 if k % 128 else 128, config, rows, use_ptx, k=k)
            yield Case("awq_gemm", label, launch, dtype, 0 if k % 128 else 128, config.block_m)
        yield _expert_case(chip, dtype, use_ptx)
        packed, out = _packed(128), _meta(_N, _K, dtype=dtype)

        def run(packed: PackedAwq = packed, out: Tensor = out) -> None:
            awq_gemm.dequantize(packed, out, use_ptx)

        yield Case("awq_dequantize", "", launches(run)[0], dtype)


def _expert_case(chip: Chip, dtype: torch.dtype, use_ptx: bool) -> Case:
    config = expert_config(chip, 128, 8, 128)
    packed, x = _packed(128, 1536, 2048, 8), _meta(64, 2048, dtype=dtype)
    rows, owners = _meta(256, dtype=torch.int32), _meta(256 // config.block_m, dtype=torch.int32)
    out = _meta(128, 1536, dtype=dtype)
    found = launches(lambda: awq_gemm.grouped_gemm(x, packed, out, rows, owners, 2, config, use_ptx))
    return Case("awq_gemm", "experts", found[0], dtype, 128, config.block_m)


def attention_cases(arch: str, short: bool = False) -> Iterator[Case]:
    """Decode, merge and prefill: head sizes, 16-bit and int8 caches, windows and soft caps, and the segmented prefill."""
    dtypes = (torch.float16,) if arch == "sm_75" or short else (torch.float16, torch.bfloat16)
    for dtype in dtypes:
        for head_dim in (128,) if short else HEAD_DIMS if dtype == torch.float16 else (128,):
            for int8 in (False, True):
                yield from _attention(chip_of(arch), dtype, head_dim, int8, 0, 0.0, 0)
        if not short:
            yield from _attention(chip_of(arch), dtype, 128, False, 1024, 30.0, 0)
            for head_dim in (64, 128, 256):
                for int8 in (False, True):
                    yield from _attention(chip_of(arch), dtype, head_dim, int8, 0, 0.0, 256)


def _attention(
    chip: Chip, dtype: torch.dtype, head_dim: int, int8: bool, window: int, soft_cap: float, prefill_segment: int
) -> Iterator[Case]:
    heads, kv_heads, blocks, sequences = 32, 8, 64, 64
    pool = [_meta(blocks, kv_heads, 16, head_dim, dtype=torch.int8 if int8 else dtype) for _ in range(2)]
    scales = [_meta(blocks, kv_heads, 16, dtype=torch.float32) if int8 else None for _ in range(2)]
    lists = [_meta(*shape, dtype=torch.int32) for shape in ((sequences, 512), (sequences,), (sequences + 1,), (3,))]
    q, out = _meta(256, heads, head_dim, dtype=dtype), _meta(256, heads * head_dim, dtype=dtype)
    sizes = attention.workspace_sizes(sequences, heads, kv_heads, head_dim, 16)
    acc, stats = (_meta(size, dtype=torch.float32) for size in sizes)
    tile = attention_config(chip, head_dim, heads // kv_heads, prefill_segment > 0, int8)
    label = f"D {head_dim}{', int8' if int8 else ''}{', window, soft cap' if window else ''}"
    if not prefill_segment:
        decode, merge = launches(
            lambda: attention.decode(
                q,
                *pool,
                *scales,
                *lists,
                acc,
                stats,
                out,
                sequences,
                16,
                512,
                0.1,
                window,
                soft_cap,
                tile.key_block,
                tile.decode_warps,
                tile.num_stages,
            )
        )
        yield Case("attention_decode", label, decode, dtype)
        if not int8:
            yield Case("attention_merge", label, merge, dtype)
    found = launches(
        lambda: attention.prefill(
            q,
            *pool,
            *scales,
            *lists,
            out,
            prefill_segment,
            0.1,
            window,
            soft_cap,
            tile.key_block,
            tile.rows,
            tile.prefill_warps,
            tile.num_stages,
        )
    )
    yield Case("attention_prefill", label + (", batch invariant" if prefill_segment else ""), found[0], dtype)


def other_cases(arch: str, short: bool = False) -> Iterator[Case]:
    """The elementwise kernels, sampling, and the dense product of the batch invariant mode."""
    for dtype in (torch.float16,) if arch == "sm_75" or short else (torch.float16, torch.bfloat16):
        for name, run in _elementwise(chip_of(arch), dtype).items():
            for launch in launches(run):
                yield Case(name, "", launch, dtype)


def _elementwise(chip: Chip, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    def half(*shape: int) -> Tensor:
        return _meta(*shape, dtype=dtype)

    def single(*shape: int) -> Tensor:
        return _meta(*shape, dtype=torch.float32)

    def whole(*shape: int) -> Tensor:
        return _meta(*shape, dtype=torch.int32)

    def norm(width: int, unit_offset: bool, of_x: bool = False, of_total: bool = True) -> None:
        weights = [single(width) if wanted else None for wanted in (of_x, of_total)]
        fused.add_rms_norm(
            half(16, width), single(16, width), *weights, half(16, width), single(16, width), 1e-5, unit_offset
        )

    def rope(int8: bool, all_heads: bool = False) -> None:
        pool = [_meta(64, 8, 16, 128, dtype=torch.int8 if int8 else dtype) for _ in range(2)]
        scales = [single(64, 8, 16) if int8 else None for _ in range(2)]
        table, norms = single(4096, 64), [single(128 * heads if all_heads else 128) for heads in (32, 8)]
        fused.rope_and_store(
            half(16, 6144), half(16, 32, 128), *pool, *scales, *norms, table, table, whole(16), whole(16), whole(3),
            1e-6, False,
        )  # fmt: skip

    long = _meta(64, dtype=torch.int64)
    return {
        "embed": lambda: fused.embed(whole(16), half(1000, 4096), 1.0, half(16, 4096)),
        "gather_rows": lambda: fused.gather_rows(half(16, 4096), whole(16), whole(3), half(16, 4096)),
        "add_rms_norm": lambda: norm(4096, False),
        "add_rms_norm, 8192": lambda: norm(8192, True),
        "add_rms_norm, of x too": lambda: norm(5376, True, of_x=True),
        "add_rms_norm, of x alone": lambda: norm(5120, False, of_x=True, of_total=False),
        "rope_and_store": lambda: rope(False),
        "rope_and_store, int8": lambda: rope(True),
        "rope_and_store, normed over all heads": lambda: rope(False, all_heads=True),
        "act_and_mul, silu": lambda: fused.act_and_mul(half(16, 28672), half(16, 14336), False),
        "act_and_mul, gelu": lambda: fused.act_and_mul(half(16, 28672), half(16, 14336), True),
        "soft_cap": lambda: fused.soft_cap(single(16, 128256), 30.0),
        "dense, batch invariant": lambda: fused.dense(
            half(64, 4096), half(1024, 4096), None, half(64, 1024), *dense_tile(chip)
        ),
        "sample": lambda: sampling.sample(
            single(64, 128256), single(64), whole(64), single(64), single(64), long, long, whole(2, 64)
        ),
        "adjust_logits": lambda: sampling.adjust_logits(
            single(64, 128256), whole(64, 128256), single(64), single(64), single(64), whole(64, 4008)
        ),
        "add_bias": lambda: sampling.add_bias(single(64, 128256), whole(16), whole(16), single(16)),
    }


def all_cases(arch: str, short: bool = False) -> Iterator[Case]:
    yield from gemm_cases(arch, short)
    yield from attention_cases(arch, short)
    yield from other_cases(arch, short)
