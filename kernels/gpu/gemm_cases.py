"""The quantized product in every configuration that the shape policy picks, and in every way into and out of its loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from kernels.gpu import awq_gemm
from kernels.gpu.awq_gemm import PackedAwq
from kernels.gpu.case import Case, chip_of, dtypes_of, launches, meta
from kernels.gpu.launch import Launch
from kernels.gpu.tuning import Chip, GemmConfig, expert_config, gemm_config, turing_config

GROUP_SIZES = (128, 64, 32, 0)
ROWS = (8, 16, 32, 64, 128)
_N = _K = 4096
_RAGGED_K = 4000
_FP16 = torch.float16


def _packed(group_size: int, n: int = _N, k: int = _K, experts: int = 0, scale_bf16: bool = False) -> PackedAwq:
    lead = (experts,) if experts else ()
    num_n, num_k = -(-n // 128), -(-k // 128)
    groups = 1 if group_size == 0 else -(-num_k * 128 // group_size)
    return PackedAwq(
        meta(*lead, num_n, num_k, 128, 32, dtype=torch.int16),
        meta(*lead, num_n, groups, 128, dtype=torch.int32),
        n,
        k,
        group_size,
        scale_bf16,
        experts,
    )


def gemm_launch(
    dtype: torch.dtype,
    group_size: int,
    config: GemmConfig,
    rows: int,
    use_ptx: bool,
    k: int = _K,
    has_bias: bool = False,
    out_dtype: torch.dtype | None = None,
    scale_bf16: bool = False,
) -> Launch:
    x, out = meta(rows, k, dtype=dtype), meta(rows, _N, dtype=out_dtype or dtype)
    partials = meta(max(1, config.partials(rows, _N)), dtype=torch.float32)
    arrivals = meta(config.tiles(rows, _N), dtype=torch.int32)
    bias = meta(_N, dtype=torch.float32) if has_bias else None
    packed = _packed(group_size, _N, k, scale_bf16=scale_bf16)
    return launches(lambda: awq_gemm.gemm(x, packed, bias, out, partials, arrivals, config, use_ptx))[0]


def _policy(chip: Chip, rows: int, group_size: int, k: int = _K) -> GemmConfig | None:
    """None where `rows` is not a tile of this architecture."""
    config = gemm_config(chip, rows, _N, k, group_size)
    return None if config.dequantize or (config.block_m != rows and rows < 128) else config


def gemm_cases(arch: str, short: bool = False) -> Iterator[Case]:
    """Every regime, group size and dtype. Short: fp16 and bf16 at group 128, one regime of the others."""
    chip, use_ptx = chip_of(arch), arch.startswith("sm_")
    for dtype in dtypes_of(arch):
        for group_size in GROUP_SIZES:
            for rows in ROWS:
                if short and not (rows == 16 and (dtype == _FP16 or group_size == 128)):
                    continue
                config = _policy(chip, rows, group_size)
                if config is not None:
                    launch = gemm_launch(dtype, group_size, config, rows, use_ptx)
                    yield Case("awq_gemm", f"M<={rows}", launch, dtype, group_size, config.block_m)
    if not short:
        yield from _invariant_cases(arch)
        yield from _ragged_cases(arch)
        yield from _end_cases(arch)
        yield from _scale_cases(arch)
        yield from _expert_cases(arch)
        yield from _dequantize_cases(arch)


def _invariant_cases(arch: str) -> Iterator[Case]:
    chip, use_ptx = chip_of(arch), arch.startswith("sm_")
    for dtype in dtypes_of(arch):
        for group_size in GROUP_SIZES:
            for label, rows in (("batch invariant", 64), ("batch invariant, long", 4096)):
                config = gemm_config(chip, rows, _N, _K, group_size, batch_invariant=True)
                launch = gemm_launch(dtype, group_size, config, rows, use_ptx)
                yield Case("awq_gemm", label, launch, dtype, group_size, config.block_m)


def _ragged_cases(arch: str) -> Iterator[Case]:
    """K not a multiple of the tile: loads of the activations masked in the loop."""
    chip, use_ptx = chip_of(arch), arch.startswith("sm_")
    for group_size in (64, 32, 0):
        k = _K - 64 if group_size == 64 else _RAGGED_K
        for rows in ROWS:
            config = _policy(chip, rows, group_size, k)
            if config is not None:
                launch = gemm_launch(_FP16, group_size, config, rows, use_ptx, k)
                yield Case("awq_gemm", f"ragged K, M<={rows}", launch, _FP16, group_size, config.block_m)
        config = gemm_config(chip, 4096, _N, k, group_size, batch_invariant=True)
        launch = gemm_launch(_FP16, group_size, config, 4096, use_ptx, k)
        yield Case("awq_gemm", "ragged K, batch invariant, long", launch, _FP16, group_size, config.block_m)


def _end_cases(arch: str) -> Iterator[Case]:
    """What comes after the loop: sums of parts, a bias, logits in fp32."""
    chip, use_ptx = chip_of(arch), arch.startswith("sm_")
    base = gemm_config(chip, 16, _N, _K, 128)
    for num_parts in {1, base.num_parts}:
        for has_bias in (False, True):
            for out_dtype in (_FP16, torch.float32):
                config = turing_config(num_parts) if arch == "sm_75" else replace(base, num_parts=num_parts)
                launch = gemm_launch(_FP16, 128, config, 16, use_ptx, has_bias=has_bias, out_dtype=out_dtype)
                words = ["whole K"] * (num_parts == 1) + ["bias"] * has_bias + ["fp32 out"] * (out_dtype != _FP16)
                if words:
                    yield Case("awq_gemm", ", ".join(words), launch, _FP16, 128, config.block_m)


def _scale_cases(arch: str) -> Iterator[Case]:
    """Scales of the checkpoint in bfloat16."""
    chip, use_ptx = chip_of(arch), arch.startswith("sm_")
    for dtype in dtypes_of(arch):
        for group_size in GROUP_SIZES:
            config = gemm_config(chip, 16, _N, _K, group_size)
            launch = gemm_launch(dtype, group_size, config, 16, use_ptx, scale_bf16=True)
            yield Case("awq_gemm", "bf16 scales", launch, dtype, group_size, config.block_m)


def _expert_cases(arch: str) -> Iterator[Case]:
    """Grouped over experts, into them (two per token) and out of them: at every tile, and batch invariant."""
    chip, use_ptx = chip_of(arch), arch.startswith("sm_")
    for dtype in dtypes_of(arch):
        for label, mean, top_k, invariant in (
            ("experts, M<=16", 16, 2, False),
            ("experts, M<=32", 32, 2, False),
            ("experts, M<=64", 64, 2, False),
            ("experts, batch invariant", 16, 2, True),
            ("experts down, M<=16", 16, 1, False),
            ("experts down, M<=32", 32, 1, False),
            ("experts down, M<=64", 64, 1, False),
            ("experts down, batch invariant", 16, 1, True),
        ):
            config = expert_config(chip, mean * 8, 8, 128, invariant)
            if f"M<={config.block_m}" not in label and "M<=" in label:
                continue  # not a tile of this architecture
            packed, x = _packed(128, 1536, 2048, 8), meta(mean * 8 // top_k, 2048, dtype=dtype)
            rows, owners = meta(1024, dtype=torch.int32), meta(1024 // config.block_m, dtype=torch.int32)
            out = meta(mean * 8, 1536, dtype=dtype)

            def run(
                x: torch.Tensor = x,
                packed: PackedAwq = packed,
                out: torch.Tensor = out,
                rows: torch.Tensor = rows,
                owners: torch.Tensor = owners,
                top_k: int = top_k,
                config: GemmConfig = config,
            ) -> None:
                awq_gemm.grouped_gemm(x, packed, out, rows, owners, top_k, config, use_ptx)

            yield Case("awq_gemm", label, launches(run)[0], dtype, 128, config.block_m)


def _dequantize_cases(arch: str) -> Iterator[Case]:
    use_ptx = arch.startswith("sm_")
    for dtype in dtypes_of(arch):
        for group_size in GROUP_SIZES:
            for scale_bf16 in (False, True):
                packed, out = _packed(group_size, scale_bf16=scale_bf16), meta(_N, _K, dtype=dtype)

                def run(packed: PackedAwq = packed, out: torch.Tensor = out) -> None:
                    awq_gemm.dequantize(packed, out, use_ptx)

                label = "bf16 scales" if scale_bf16 else ""
                yield Case("awq_dequantize", label, launches(run)[0], dtype, group_size)
