"""The quantized linear in the interpreter against the dequantized weight, for every mode, dtype, group size and ragged
shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.format import AwqWeight, pack_int4
from kernels.gpu import awq_gemm, tuning
from kernels.gpu.awq_gemm import PackedAwq
from kernels.gpu.tuning import CHIPS, GemmConfig

BOUND = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest error over the largest output: of a weight that is scaled in 16 bit, or an output that is."""


def make_weight(n: int, k: int, group_size: int, seed: int = 0, scale_dtype: torch.dtype = torch.float16) -> AwqWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = k // group_size

    def integers(rows: int) -> Tensor:
        return torch.randint(0, 16, (rows, n), generator=generator, dtype=torch.uint8)

    scales = (0.002 + 0.02 * torch.rand(groups, n, generator=generator)).to(scale_dtype)
    return AwqWeight("w", pack_int4(integers(k)), pack_int4(integers(groups)), scales, group_size)


def run(
    x: Tensor,
    weight: PackedAwq,
    config: GemmConfig,
    bias: Tensor | None = None,
    use_ptx: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    rows, n = x.shape[0], weight.out_features
    out = torch.full((rows, n), float("nan"), dtype=out_dtype or x.dtype)
    partials = torch.full((max(1, config.partials(rows, n)),), float("nan"))
    arrivals = torch.zeros(config.tiles(rows, n), dtype=torch.int32)
    awq_gemm.gemm(x, weight, bias, out, partials, arrivals, config, use_ptx)
    assert not arrivals.any(), "the counters are left as they were found"
    return out


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (got.float() - expected).abs().max() / expected.abs().max()
    assert error < BOUND[dtype], f"largest relative error {error:.2e}"


# rows, N, K, group, parts: ragged everywhere, every regime.
SHAPES = [
    (1, 136, 256, 128, 2),
    (5, 128, 320, 64, 1),
    (8, 8, 96, 32, 1),
    (13, 264, 384, 128, 3),
    (16, 128, 96, 96, 1),
    (17, 120, 576, 64, 2),
    (33, 128, 192, 96, 1),
    (50, 96, 512, 256, 2),
    (40, 72, 416, 416, 1),
    (3, 128, 40, 40, 1),
    (150, 136, 256, 128, 1),
]


def shapes_and_dtypes() -> Iterator[object]:
    """Every shape in fp16; in bf16 one for each way through the unpacking, the others in `make check`."""
    for index, shape in enumerate(SHAPES):
        yield pytest.param(*shape, torch.float16)
        yield pytest.param(*shape, torch.bfloat16, marks=[] if index in (2, 3, 7) else pytest.mark.slow)


@pytest.mark.parametrize(("rows", "n", "k", "group_size", "parts", "dtype"), list(shapes_and_dtypes()))
def test_product_equals_the_dequantized_weights(
    rows: int, n: int, k: int, group_size: int, parts: int, dtype: torch.dtype
) -> None:
    weight = make_weight(n, k, group_size)
    packed = awq_gemm.pack(weight, dtype)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.linspace(-1, 1, n)
    expected = x.float() @ weight.dequantize().t() + bias
    block_m = next(size for size in (8, 16, 32, 64, 128) if rows <= size or size == 128)
    for scale_after in (True, False):
        config = GemmConfig(block_m, parts, True, scale_after)
        got = run(x, packed, config, bias)
        assert_near(got, expected, dtype)
        assert torch.equal(got, run(x, packed, config, bias, use_ptx=False)), "with and without inline assembly"
    fp32 = run(x, packed, GemmConfig(block_m, parts), bias, out_dtype=torch.float32)
    error = (fp32 - expected).abs().max() / expected.abs().max()
    assert error < 2e-6, f"scales after the dot round nothing: {error:.1e}"


def test_scales_of_either_dtype_are_taken_as_they_are() -> None:
    for scale_dtype in (torch.float16, torch.bfloat16):
        weight = make_weight(128, 256, 64, scale_dtype=scale_dtype)
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.randn(4, 256).to(dtype)
            got = run(x, awq_gemm.pack(weight, dtype), GemmConfig(8), out_dtype=torch.float32)
            torch.testing.assert_close(got, x.float() @ weight.dequantize().t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_is_the_weight_rounded_once(dtype: torch.dtype) -> None:
    for n, k, group_size in ((136, 320, 64), (64, 96, 32), (128, 256, 256)):
        weight = make_weight(n, k, group_size)
        out = torch.empty(n, k, dtype=dtype)
        awq_gemm.dequantize(awq_gemm.pack(weight, dtype), out, True)
        assert torch.equal(out, weight.dequantize(dtype))


def test_columns_of_a_wider_output() -> None:
    weight = make_weight(64, 128, 128)
    x, whole = torch.randn(9, 128).half(), torch.zeros(9, 200, dtype=torch.float16)
    packed = awq_gemm.pack(weight, torch.float16)
    awq_gemm.gemm(x, packed, None, whole[:, 100:164], x, x, GemmConfig(16), True)
    assert_near(whole[:, 100:164], x.float() @ weight.dequantize().t(), torch.float16)
    assert not whole[:, :100].any() and not whole[:, 164:].any()


def test_batch_invariant_bits_do_not_depend_on_the_rows() -> None:
    """Splitting K over programs or walking the parts in turn, alone or among others: the same bits."""
    weight = awq_gemm.pack(make_weight(136, 1152, 128), torch.float16)
    x = torch.randn(130, 1152, generator=torch.Generator().manual_seed(2)).half()
    chip = CHIPS["T4"]
    configs = {
        rows: tuning.gemm_config(chip, rows, 136, 1152, 128, batch_invariant=True) for rows in (1, 5, 64, 129, 130)
    }
    assert configs[1].num_parts > 1 and configs[1].split and not configs[130].split
    whole = run(x, weight, configs[130])
    for rows, config in configs.items():
        assert torch.equal(run(x[:rows].contiguous(), weight, config), whole[:rows]), rows


@pytest.mark.parametrize("block_m", [16, 64])
def test_grouped_product_over_experts(block_m: int) -> None:
    num_experts, top_k, tokens, n, k = 5, 2, 21, 72, 192
    experts = [make_weight(n, k, 64, seed) for seed in range(num_experts)]
    packed = awq_gemm.stack_experts([awq_gemm.pack(expert, torch.float16) for expert in experts])
    generator = torch.Generator().manual_seed(4)
    # Expert 3 gets no token at all.
    ids = torch.tensor([0, 1, 2, 4])[torch.randint(0, 4, (tokens, top_k), generator=generator)]
    x = torch.randn(tokens, k, generator=generator).half()
    rows, owners = awq_gemm.align_experts(ids, num_experts, block_m)
    assert sorted(rows[rows >= 0].tolist()) == list(range(tokens * top_k))
    out = torch.full((tokens * top_k, n), float("nan"), dtype=torch.float16)
    awq_gemm.grouped_gemm(x, packed, out, rows, owners, top_k, GemmConfig(block_m), True)
    for choice, expert in enumerate(ids.reshape(-1).tolist()):
        expected = x[choice // top_k].float() @ experts[expert].dequantize().t()
        torch.testing.assert_close(out[choice].float(), expected, rtol=1e-2, atol=2e-3 * expected.abs().max().item())


def test_policy_covers_every_row_count() -> None:
    for chip in CHIPS.values():
        for rows in (1, 8, 9, 16, 33, 64, 65, 128, 300, 5000):
            config = tuning.gemm_config(chip, rows, 4096, 4096, 128)
            assert config.dequantize or config.block_m >= min(rows, 64)
            parts = config.num_parts
            assert 1 <= parts <= 8 and -(-32 // -(-32 // parts)) == parts, "no part of K is empty"
        fixed = {
            (c.block_m, c.num_parts, c.scale_after, c.dequantize)
            for c in (tuning.gemm_config(chip, rows, 6144, 4096, 128, True) for rows in (1, 64, 65, 4096))
        }
        assert len(fixed) == 1


def test_an_unknown_chip_takes_its_makers_row() -> None:
    for arch, known in (("gfx90a", "MI300X"), ("sm_87", "A10")):
        chip = dataclasses.replace(CHIPS[known], arch=arch)
        for rows in (1, 16, 64, 100):
            assert tuning.gemm_config(chip, rows, 4096, 4096, 128) == tuning.gemm_config(
                CHIPS[known], rows, 4096, 4096, 128
            )


def test_experts_batch_invariant_take_one_tile() -> None:
    chip = CHIPS["A100-80GB"]
    assert len({tuning.expert_config(chip, rows, 8, 128, True) for rows in (1, 100, 5000)}) == 1
    assert len({tuning.expert_config(chip, rows, 8, 128) for rows in (1, 200, 5000)}) == 3


def test_regimes_meet_every_configuration() -> None:
    for name in ("T4", "A100-80GB", "H100-SXM", "MI300X"):
        for invariant in (False, True):

            def config(rows: int, name: str = name, invariant: bool = invariant) -> GemmConfig:
                return tuning.gemm_config(CHIPS[name], rows, 12800, 4096, 128, invariant)

            tried = tuning.regimes(config, 1100)
            assert {config(rows) for rows in tried} == {config(rows) for rows in range(1, 1101)}
            assert max(tried) <= 1100 and len(tried) <= 12


def test_wrong_shapes_are_refused_by_name() -> None:
    packed = awq_gemm.pack(make_weight(64, 128, 64), torch.float16)
    with pytest.raises(ValueError, match="tiles do not make"):
        run(torch.randn(2, 300).half(), packed, GemmConfig(8))
    with pytest.raises(ValueError, match="workspace holds 1 of"):
        x = torch.randn(2, 128).half()
        awq_gemm.gemm(x, packed, None, torch.empty(2, 64).half(), torch.empty(1), x, GemmConfig(8, 2), True)
