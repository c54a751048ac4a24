"""Attention, the elementwise kernels and sampling, in every mode that a step has them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.gpu import attention, fused, moe, sampling
from kernels.gpu.case import Case, chip_of, dtypes_of, launches, meta
from kernels.gpu.tuning import Chip, attention_config, dense_tile

HEAD_DIMS = (64, 80, 96, 128, 256)


def attention_cases(arch: str, short: bool = False) -> Iterator[Case]:
    """Decode, merge and prefill: head sizes, 16-bit and int8 caches, and the segmented prefill; windows and soft caps, apart and
    together."""
    chip = chip_of(arch)
    for dtype in dtypes_of(arch)[: 1 if short else 2]:
        for head_dim in (128,) if short else HEAD_DIMS if dtype == torch.float16 else (128,):
            for int8 in (False, True):
                yield from _attention(chip, dtype, head_dim, int8, 0, 0.0, 0)
        if not short:
            for head_dim in (64, 128, 256):
                for int8 in (False, True):
                    yield from _attention(chip, dtype, head_dim, int8, 0, 0.0, 256)
            yield from _attention(chip, dtype, 256, False, 1024, 30.0, 0)
    if short:
        return
    for int8 in (False, True):
        for segment in (0, 256):
            for window, soft_cap in ((1024, 0.0), (0, 30.0), (1024, 30.0)):
                yield from _attention(chip, torch.float16, 128, int8, window, soft_cap, segment)
            yield from _attention(chip, torch.float16, 256, int8, 1024, 30.0, segment)


def _attention(
    chip: Chip, dtype: torch.dtype, head_dim: int, int8: bool, window: int, soft_cap: float, prefill_segment: int
) -> Iterator[Case]:
    heads, kv_heads, blocks, sequences = 32, 8, 64, 64
    pool = [meta(blocks, kv_heads, 16, head_dim, dtype=torch.int8 if int8 else dtype) for _ in range(2)]
    scales = [meta(blocks, kv_heads, 16, dtype=torch.float32) if int8 else None for _ in range(2)]
    lists = [meta(*shape, dtype=torch.int32) for shape in ((sequences, 512), (sequences,), (sequences + 1,), (3,))]
    q, out = meta(256, heads, head_dim, dtype=dtype), meta(256, heads * head_dim, dtype=dtype)
    sizes = attention.workspace_sizes(sequences, heads, head_dim, 16)
    acc, stats = (meta(size, dtype=torch.float32) for size in sizes)
    tile = attention_config(chip, head_dim, heads // kv_heads, prefill_segment > 0, int8)
    words = [f"D {head_dim}", *["int8"] * int8, *["window"] * (window > 0), *["soft cap"] * (soft_cap > 0)]
    label = ", ".join(words)
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
    for dtype in dtypes_of(arch)[: 1 if short else 2]:
        for name, run in _elementwise(chip_of(arch), dtype).items():
            for launch in launches(run):
                yield Case(name, "", launch, dtype)
    for name, run in _after().items():
        for launch in launches(run):
            yield Case(name, "", launch, torch.float32)


def _elementwise(chip: Chip, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    def half(*shape: int) -> Tensor:
        return meta(*shape, dtype=dtype)

    def single(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.float32)

    def whole(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.int32)

    def rope(
        int8: bool, normed: bool = True, rotated: bool = True, unit_offset: bool = False, all_heads: bool = False
    ) -> None:
        pool = [meta(64, 8, 16, 128, dtype=torch.int8 if int8 else dtype) for _ in range(2)]
        scales = [single(64, 8, 16) if int8 else None for _ in range(2)]
        norms = [single(128 * heads if all_heads else 128) if normed else None for heads in (32, 8)]
        table = single(4096, 64) if rotated else None
        fused.rope_and_store(
            half(16, 6144), half(16, 32, 128), *pool, *scales, *norms, table, table, whole(16), whole(16), whole(3),
            1e-6, unit_offset,
        )  # fmt: skip

    def norm(width: int, has_residual: bool, unit_offset: bool, of_x: bool = False, of_total: bool = True) -> None:
        residual = single(16, width) if has_residual else None
        weights = [single(width) if wanted else None for wanted in (of_x, of_total)]
        fused.add_rms_norm(half(16, width), residual, *weights, half(16, width), single(16, width), 1e-5, unit_offset)

    def dense(has_bias: bool, out_dtype: torch.dtype) -> None:
        bias = single(1024) if has_bias else None
        fused.dense(half(64, 4096), half(1024, 4096), bias, meta(64, 1024, dtype=out_dtype), *dense_tile(chip))

    def combine(is_shared: bool) -> None:
        shared = half(16, 4096) if is_shared else None
        moe.combine(half(32, 4096), shared, single(16, 3 if is_shared else 2), half(16, 4096))

    return {
        "moe_combine": lambda: combine(False),
        "moe_combine, shared": lambda: combine(True),
        "embed": lambda: fused.embed(whole(16), half(1000, 4096), 1.0, half(16, 4096)),
        "gather_rows": lambda: fused.gather_rows(half(16, 4096), whole(16), whole(3), half(16, 4096)),
        "gather_rows, fp32": lambda: fused.gather_rows(single(16, 4096), whole(16), whole(3), single(16, 4096)),
        "add_rms_norm": lambda: norm(4096, True, False),
        "add_rms_norm, 8192": lambda: norm(8192, True, True),
        "add_rms_norm, first": lambda: norm(4096, False, False),
        "add_rms_norm, first, 1 + w": lambda: norm(4096, False, True),
        "add_rms_norm, first, none": lambda: norm(4096, False, False, of_total=False),
        "add_rms_norm, of x too": lambda: norm(4096, True, False, of_x=True),
        "add_rms_norm, of x too, 1 + w": lambda: norm(5376, True, True, of_x=True),
        "add_rms_norm, of x alone": lambda: norm(5120, True, False, of_x=True, of_total=False),
        "rope_and_store": lambda: rope(False),
        "rope_and_store, int8": lambda: rope(True),
        "rope_and_store, no norm": lambda: rope(False, normed=False),
        "rope_and_store, no norm, int8": lambda: rope(True, normed=False),
        "rope_and_store, no rotation": lambda: rope(False, normed=False, rotated=False),
        "rope_and_store, normed over all heads": lambda: rope(False, all_heads=True),
        "rope_and_store, normed over all heads, int8": lambda: rope(True, all_heads=True),
        "rope_and_store, no rotation, int8": lambda: rope(True, normed=False, rotated=False),
        "rope_and_store, 1 + w": lambda: rope(False, unit_offset=True),
        "rope_and_store, 1 + w, int8": lambda: rope(True, unit_offset=True),
        "act_and_mul, silu": lambda: fused.act_and_mul(half(16, 28672), half(16, 14336), False),
        "act_and_mul, gelu": lambda: fused.act_and_mul(half(16, 28672), half(16, 14336), True),
        "dense, batch invariant": lambda: dense(False, dtype),
        "dense, batch invariant, bias": lambda: dense(True, dtype),
        "dense, batch invariant, fp32 out": lambda: dense(False, torch.float32),
    }


def _after() -> dict[str, Callable[[], Any]]:
    """What becomes of logits, which are fp32 whatever the activations are: the routers' too."""

    def single(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.float32)

    def whole(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.int32)

    def adjust(penalized: bool, masked: bool) -> None:
        history = whole(64, 128256) if penalized else None
        factors = [single(64) if penalized else None for _ in range(3)]
        sampling.adjust_logits(single(64, 128256), history, *factors, whole(64, 4008) if masked else None)

    long = meta(64, dtype=torch.int64)
    return {
        "moe_route": lambda: moe.route(single(64, 8), whole(64, 2), single(64, 2), True),
        "moe_route, shared": lambda: moe.route(single(64, 61), whole(64, 4), single(64, 5), False),
        "moe_route, shared, of the active": lambda: moe.route(single(64, 61), whole(64, 4), single(64, 5), True),
        "moe_route, 8 of 128": lambda: moe.route(single(64, 128), whole(64, 8), single(64, 8), False),
        "soft_cap": lambda: fused.soft_cap(single(16, 128256), 30.0),
        "sample": lambda: sampling.sample(
            single(64, 128256), single(64), whole(64), single(64), single(64), single(64), long, long, whole(2, 64)
        ),
        "adjust_logits": lambda: adjust(True, True),
        "adjust_logits, penalties": lambda: adjust(True, False),
        "adjust_logits, mask": lambda: adjust(False, True),
        "add_bias": lambda: sampling.add_bias(single(64, 128256), whole(16), whole(16), single(16)),
    }
