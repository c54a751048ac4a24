"""The elementwise part of a step: embedding, norms, rotation with the KV write, gated activations, row gathering.

All compute in fp32 and round once, on the store. Rows past the step's counts (a captured graph runs whole buckets) compute
what nobody reads; only the KV write must not happen for them, so it looks at the counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import launch
from kernels.gpu.library import define, expect

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """By the exponential: 1 - 2 / (e^2x + 1), which saturates rightly at both ends."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@triton.jit
def embed_kernel(ids_ptr, table_ptr, out_ptr, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token).to(tl.int64)
    value = tl.load(table_ptr + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    value = value.to(tl.float32) * scale
    tl.store(out_ptr + token * WIDTH + columns, value.to(out_ptr.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def gather_rows_kernel(x_ptr, rows_ptr, counts_ptr, out_ptr, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out[r] = x[rows[r]]; rows past counts[2] take row 0, since their entries are stale."""
    target = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + target)
    row = tl.where(target < tl.load(counts_ptr + 2), row, 0).to(tl.int64)
    value = tl.load(x_ptr + row * x_stride + columns, mask=columns < WIDTH, other=0.0)
    tl.store(out_ptr + target * WIDTH + columns, value, mask=columns < WIDTH)


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    residual_ptr,  # fp32 or None
    x_weight_ptr,  # fp32, or None: x goes into the sum as it is
    weight_ptr,  # fp32, or None: what goes out is the sum
    out_ptr,
    total_ptr,  # fp32
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    total = tl.load(x_ptr + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    if x_weight_ptr is not None:
        total *= tl.rsqrt(tl.sum(total * total, 0) * (1.0 / WIDTH) + eps)
        x_weight = tl.load(x_weight_ptr + columns, mask=mask, other=0.0)
        if UNIT_OFFSET:
            x_weight += 1.0
        total *= x_weight
    if residual_ptr is not None:
        total += tl.load(residual_ptr + row * WIDTH + columns, mask=mask, other=0.0)
    tl.store(total_ptr + row * WIDTH + columns, total, mask=mask)
    normed = total
    if weight_ptr is not None:
        normed *= tl.rsqrt(tl.sum(total * total, 0) * (1.0 / WIDTH) + eps)
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
        if UNIT_OFFSET:
            weight += 1.0
        normed *= weight
    tl.store(out_ptr + row * WIDTH + columns, normed.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def act_and_mul_kernel(gate_up_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(gate_up_ptr + row * (2 * WIDTH) + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * WIDTH) + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        gate = 0.5 * gate * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    else:
        gate = gate / (1.0 + tl.exp2(-gate * LOG2_E))
    tl.store(out_ptr + row * WIDTH + columns, (gate * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def soft_cap_kernel(x_ptr, cap, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0)
    tl.store(x_ptr + offsets, cap * tanh(x / cap), mask=offsets < size)


@triton.jit
def rope_and_store_kernel(
    qkv_ptr,  # 16 bit [tokens, (heads + 2 kv heads) * D]
    q_out_ptr,  # 16 bit [tokens, heads, D]
    key_ptr,  # [blocks, kv heads, BLOCK_SIZE, D] 16 bit or int8
    value_ptr,
    key_scale_ptr,  # fp32 [blocks, kv heads, BLOCK_SIZE] with int8, else None
    value_scale_ptr,
    q_norm_ptr,  # fp32 [D], with NORM_ALL_HEADS [heads * D]; or None
    k_norm_ptr,
    cos_ptr,  # fp32 [positions, HALF] or None
    sin_ptr,
    positions_ptr,
    slots_ptr,
    counts_ptr,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    NORM_ALL_HEADS: tl.constexpr,
):
    """One program per token and head of q, k and v. The partner of a rotated channel is read a second time: it is in cache."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    if token >= tl.load(counts_ptr):
        return
    channels = tl.arange(0, BLOCK_D)
    mask = channels < D
    source = qkv_ptr + token.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * D) + head * D
    x = tl.load(source + channels, mask=mask, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        partner = tl.where(channels < HALF, channels + HALF, channels - HALF)
        rotates = channels < 2 * HALF
        other = tl.load(source + partner, mask=rotates, other=0.0).to(tl.float32)
        if q_norm_ptr is not None:
            norm_ptr = q_norm_ptr
            if head >= HEADS:
                norm_ptr = k_norm_ptr
            squares, inverse_width = x * x, 1.0 / D
            if NORM_ALL_HEADS:  # every head's program sums over all of them: they are in cache
                first = tl.where(head < HEADS, 0, HEADS)
                count = tl.where(head < HEADS, HEADS, KV_HEADS)
                norm_ptr += (head - first) * D
                squares = tl.zeros([BLOCK_D], tl.float32)
                inverse_width = tl.where(head < HEADS, 1.0 / (HEADS * D), 1.0 / (KV_HEADS * D))
                for i in range(count):
                    others = tl.load(source + (first + i - head) * D + channels, mask=mask, other=0.0).to(tl.float32)
                    squares += others * others
            rstd = tl.rsqrt(tl.sum(squares, 0) * inverse_width + eps)
            weight = tl.load(norm_ptr + channels, mask=mask, other=0.0)
            other_weight = tl.load(norm_ptr + partner, mask=rotates, other=0.0)
            if UNIT_OFFSET:
                weight += 1.0
                other_weight += 1.0
            x = x * rstd * weight
            other = other * rstd * other_weight
        if cos_ptr is not None:
            position = tl.load(positions_ptr + token)
            angle = position * HALF + tl.where(channels < HALF, channels, channels - HALF)
            cos = tl.load(cos_ptr + angle, mask=rotates, other=1.0)
            sin = tl.load(sin_ptr + angle, mask=rotates, other=0.0)
            x = x * cos + tl.where(channels < HALF, -other, other) * sin
    if head < HEADS:
        target = q_out_ptr + (token.to(tl.int64) * HEADS + head) * D + channels
        tl.store(target, x.to(q_out_ptr.dtype.element_ty), mask=mask)
        return
    is_key = head < HEADS + KV_HEADS
    kv_head = tl.where(is_key, head - HEADS, head - HEADS - KV_HEADS)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    row = (slot // BLOCK_SIZE * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    cache_ptr = key_ptr
    if not is_key:
        cache_ptr = value_ptr
    if key_scale_ptr is not None:
        largest = tl.max(tl.abs(x), 0)
        scale = tl.where(largest > 0, largest * (1.0 / 127.0), 1.0)
        # Adding 1.5 * 2^23 rounds to the nearest integer, which the low bits then hold.
        rounded = (x * (1.0 / scale) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        tl.store(cache_ptr + row * D + channels, rounded.to(tl.int8), mask=mask)
        scale_ptr = key_scale_ptr
        if not is_key:
            scale_ptr = value_scale_ptr
        tl.store(scale_ptr + row, scale)
    else:
        tl.store(cache_ptr + row * D + channels, x.to(key_ptr.dtype.element_ty), mask=mask)


def _embed(ids: Tensor, table: Tensor, scale: float, out: Tensor) -> None:
    width = table.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    expect(out.shape[1] == width, "embed", f"out has {out.shape[1]} columns, the table {width}")
    launch(embed_kernel, (out.shape[0], -(-width // block)), ids, table, out, scale, WIDTH=width, BLOCK=block)


def _gather_rows(x: Tensor, rows: Tensor, counts: Tensor, out: Tensor) -> None:
    width = x.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    grid = (out.shape[0], -(-width // block))
    launch(gather_rows_kernel, grid, x, rows, counts, out, x.stride(0), WIDTH=width, BLOCK=block)


def _add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    x_weight: Tensor | None,
    weight: Tensor | None,
    out: Tensor,
    total: Tensor,
    eps: float,
    unit_offset: bool,
) -> None:
    rows, width = x.shape
    for given in (x_weight, weight):
        if given is not None:
            expect(given.shape == (width,), "add_rms_norm", f"weight has shape {list(given.shape)}, x {width} columns")
    block = triton.next_power_of_2(width)
    launch(
        add_rms_norm_kernel, (rows,), x, residual, x_weight, weight, out, total, eps, WIDTH=width, BLOCK=block,
        UNIT_OFFSET=unit_offset, num_warps=min(16, max(1, block // 512)), num_stages=1,
    )  # fmt: skip


def _act_and_mul(gate_up: Tensor, out: Tensor, gelu: bool) -> None:
    rows, width = out.shape
    expect(gate_up.shape == (rows, 2 * width), "act_and_mul", f"{list(gate_up.shape)} is not [{rows}, 2 * {width}]")
    block = min(1024, triton.next_power_of_2(width))
    grid = (rows, -(-width // block))
    launch(act_and_mul_kernel, grid, gate_up, out, WIDTH=width, BLOCK=block, GELU=gelu, num_stages=1)


def _soft_cap(x: Tensor, cap: float) -> None:
    launch(soft_cap_kernel, (-(-x.numel() // 1024),), x, cap, x.numel(), BLOCK=1024, num_stages=1)


def _rope_and_store(
    qkv: Tensor,
    q_out: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    counts: Tensor,
    eps: float,
    unit_offset: bool,
) -> None:
    _, kv_heads, block_size, head_dim = keys.shape
    tokens, heads = q_out.shape[:2]
    expect(
        qkv.shape == (tokens, (heads + 2 * kv_heads) * head_dim) and qkv.is_contiguous(),
        "rope_and_store",
        f"qkv has shape {list(qkv.shape)}, expected [{tokens}, {(heads + 2 * kv_heads) * head_dim}]",
    )
    widths = (heads * head_dim, kv_heads * head_dim)
    all_heads = q_norm is not None and q_norm.shape[0] != head_dim
    if q_norm is not None and k_norm is not None:
        shapes, expected = (q_norm.shape[0], k_norm.shape[0]), widths if all_heads else (head_dim, head_dim)
        expect(shapes == expected, "rope_and_store", f"norm weights of {shapes} channels, expected {expected}")
    launch(
        rope_and_store_kernel,
        (tokens, heads + 2 * kv_heads),
        qkv,
        q_out,
        keys,
        values,
        key_scales,
        value_scales,
        q_norm,
        k_norm,
        cos,
        sin,
        positions,
        slots,
        counts,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        HALF=cos.shape[1] if cos is not None else 0,
        BLOCK_SIZE=block_size,
        UNIT_OFFSET=unit_offset,
        NORM_ALL_HEADS=all_heads,
        num_warps=1,
        num_stages=1,
    )


embed = define("embed(Tensor ids, Tensor table, float scale, Tensor(a!) out) -> ()", _embed)
gather_rows = define("gather_rows(Tensor x, Tensor rows, Tensor counts, Tensor(a!) out) -> ()", _gather_rows)
add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor? residual, Tensor? x_weight, Tensor? weight, Tensor(a!) out, Tensor(b!) total, "
    "float eps, bool unit_offset) -> ()",
    _add_rms_norm,
)
act_and_mul = define("act_and_mul(Tensor gate_up, Tensor(a!) out, bool gelu) -> ()", _act_and_mul)
soft_cap = define("soft_cap(Tensor(a!) x, float cap) -> ()", _soft_cap)
rope_and_store = define(
    "rope_and_store(Tensor qkv, Tensor(a!) q_out, Tensor(b!) keys, Tensor(c!) values, Tensor(d!)? key_scales, "
    "Tensor(e!)? value_scales, Tensor? q_norm, Tensor? k_norm, Tensor? cos, Tensor? sin, Tensor positions, "
    "Tensor slots, Tensor counts, float eps, bool unit_offset) -> ()",
    _rope_and_store,
)


@triton.jit(do_not_specialize=["num_rows"])
def dense_kernel(
    x_ptr,  # 16 bit [rows, K]
    weight_ptr,  # 16 bit [N, K]
    bias_ptr,  # fp32 [N] or None
    out_ptr,
    num_rows,
    N,
    K,
    x_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A product whose sums are in one order for any number of rows. Tiles transposed, as in the quantized one."""
    tile_n, tile_m = tl.program_id(0), tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_mask, column_mask = rows < num_rows, columns < N
    x = x_ptr + tl.where(row_mask, rows, 0)[None, :].to(tl.int64) * x_stride + depth[:, None]
    weight = weight_ptr + tl.where(column_mask, columns, 0)[:, None].to(tl.int64) * K + depth[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = depth < K - start
        acc = tl.dot(
            tl.load(weight + start, mask=inside[None, :], other=0.0),
            tl.load(x + start, mask=inside[:, None], other=0.0),
            acc,
        )
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=column_mask, other=0.0)[:, None]
    out = out_ptr + rows[None, :].to(tl.int64) * out_stride + columns[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_mask[None, :] & column_mask[:, None])


def _start_dense(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: int, num_warps: int) -> None:
    expect(
        x.shape[1] == weight.shape[1] and out.shape == (x.shape[0], weight.shape[0]),
        "dense",
        f"{list(x.shape)} times {list(weight.shape)} transposed is not {list(out.shape)}",
    )
    expect(x.dtype == weight.dtype, "dense", f"x is {x.dtype}, the weight {weight.dtype}")
    rows, n = out.shape
    if tile:
        launch(
            dense_kernel, (-(-n // 64), -(-rows // tile)), x, weight, bias, out, rows, n, x.shape[1], x.stride(0),
            out.stride(0), BLOCK_M=tile, BLOCK_N=64, BLOCK_K=tile, num_warps=num_warps, num_stages=3,
        )  # fmt: skip


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: int, num_warps: int) -> None:
    """The library's product, fp32 accumulated; off the GPU (checks) the operands are widened first. `tile` rows at a time by our
    kernel, unless it is 0."""
    _start_dense(x, weight, bias, out, tile, num_warps)
    if tile:
        return
    if x.is_cuda and out.dtype == x.dtype:
        out.copy_(torch.nn.functional.linear(x, weight, bias.to(x.dtype) if bias is not None else None))
        return
    if x.is_cuda and torch.version.cuda is not None:
        product = torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:
        product = x.float() @ weight.float().t()
    out.copy_(product if bias is None else product + bias)


dense = define(
    "dense(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, int tile, int num_warps) -> ()", _dense, _start_dense
)
