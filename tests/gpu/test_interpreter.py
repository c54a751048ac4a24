"""The interpreter's mends: bfloat16 arithmetic as torch does it, and the PTX that kernels use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.gpu.interpreter import bf16_to_fp32, fp32_to_bf16, run_ptx


@triton.jit
def arithmetic(a_ptr, b_ptr, sum_ptr, product_ptr, dot_ptr, cast_ptr, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    offsets = rows[:, None] * SIZE + rows[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    tl.store(sum_ptr + offsets, a + b)
    tl.store(product_ptr + offsets, tl.where(a > b, a * b, -a))
    product = tl.dot(a, b)
    tl.store(dot_ptr + offsets, product)
    tl.store(cast_ptr + offsets, product.to(tl.bfloat16))


def test_bfloat16_is_computed_as_torch_does() -> None:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    sums, products, cast = (torch.empty_like(a) for _ in range(3))
    dot = torch.empty(16, 16)
    arithmetic[(1,)](a, b, sums, products, dot, cast, SIZE=16)
    assert torch.equal(sums, a + b) and torch.equal(products, torch.where(a > b, a * b, -a))
    torch.testing.assert_close(dot, a.float() @ b.float())
    assert torch.equal(cast, dot.bfloat16())


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    values = torch.cat((torch.randn(1000), torch.tensor([1.00390625, 1.01171875, float("inf"), float("nan")])))
    bits = torch.from_numpy(fp32_to_bf16(values.numpy()).astype(np.int32)).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(bits[:-1], values[:-1].bfloat16()) and bits[-1].isnan()
    assert np.array_equal(bf16_to_fp32(fp32_to_bf16(np.float32([2.5]))), np.float32([2.5]))


def test_ptx_logic() -> None:
    a, b, c = (np.random.default_rng(seed).integers(0, 2**32, 8, dtype=np.uint32) for seed in range(3))
    # 0xea is (a & b) | c.
    (got,) = run_ptx("lop3.b32 $0, $1, $2, $3, 0xea;", [a, b, c], 1)
    assert np.array_equal(got, (a & b) | c)
    (got,) = run_ptx("{ .reg .b32 t; shr.u32 t, $1, 8; lop3.b32 $0, t, 0x000f000f, 0x64006400, 0xea; }", [a], 1)
    assert np.array_equal(got, ((a >> 8) & 0x000F000F) | 0x64006400)
    with pytest.raises(NotImplementedError, match="prmt"):
        run_ptx("prmt.b32 $0, $1, $1, 0x1;", [a], 1)
