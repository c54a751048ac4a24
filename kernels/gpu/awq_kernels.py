"""Triton kernels of the quantized linear: 4-bit weights times 16-bit activations, fp32 accumulation.

Weights are the first operand: a program computes a [BLOCK_N, BLOCK_M] tile of the transposed output, so that every weight is
unpacked by exactly one warp, and on Hopper goes to the tensor core from registers.

Layout ("slabs", made once at load): the words of one 128 x 128 tile are contiguous, int16 [N/128, K/128, 128, 32]; nibble j
of word (n, i) is the weight of column n at k = 128 tile + 32 j + i. So nibble plane j meets 32 contiguous activations, and
only elementwise ops stand between load and dot: Triton then loads the words in the dot's own register layout.

A weight is q - z exactly, as the small integer it is: nibbles are set into the mantissa of 1024 (fp16) or 128 (bf16) by a
lop3 and the subtraction of 1024 + z or 128 + z removes the bias. Scales are applied to the fp32 product of a group
(SCALE_AFTER), which rounds nothing, or to the weight, which is cheaper for many rows. A group that spans all of K is scaled
once, at the end.
"""

import triton
import triton.language as tl

TILE_N = 128
TILE_K = 128
PLANES = 4
PLANE = TILE_K // PLANES


@triton.jit
def unpack_planes(words, zero0, zero1, zero2, zero3, USE_PTX: tl.constexpr, BF16: tl.constexpr):
    """int16 words [N, 32] to four planes q - z in fp16 or bf16. zeroJ [N, 1]: -(1024 + z) or -(128 + z), of each plane."""
    if BF16:
        if USE_PTX:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                """
                {
                .reg .b32 t1, t2, t3;
                shr.u32 t1, $4, 4;
                shr.u32 t2, $4, 8;
                shr.u32 t3, $4, 12;
                lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
                lop3.b32 $1, t1, 0x000f000f, 0x43004300, 0xea;
                lop3.b32 $2, t2, 0x000f000f, 0x43004300, 0xea;
                lop3.b32 $3, t3, 0x000f000f, 0x43004300, 0xea;
                }
                """,
                "=&r,=&r,=&r,=&r,r",
                [words],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            w0 = ((words & 0xF) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
            w1 = (((words >> 4) & 0xF) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
            w2 = (((words >> 8) & 0xF) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
            w3 = (((words >> 12) & 0xF) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return w0 + zero0, w1 + zero1, w2 + zero2, w3 + zero3
    else:
        if USE_PTX:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                """
                {
                .reg .b32 t;
                shr.u32 t, $4, 8;
                lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
                lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
                lop3.b32 $2, t, 0x000f000f, 0x64006400, 0xea;
                lop3.b32 $3, t, 0x00f000f0, 0x64006400, 0xea;
                }
                """,
                "=&r,=&r,=&r,=&r,r",
                [words],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            high = words >> 8
            w0 = ((words & 0x000F) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
            w1 = ((words & 0x00F0) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
            w2 = ((high & 0x000F) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
            w3 = ((high & 0x00F0) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        # The odd planes read 1024 + 16 q: a sixteenth of it is 64 + q, and -(64 + z) = -(1024 + z) + 960, all exact in fp16.
        return w0 + zero0, w1 * 0.0625 + (zero1 + 960.0), w2 + zero2, w3 * 0.0625 + (zero3 + 960.0)


@triton.jit
def load_group(tile_ptr, group, DTYPE: tl.constexpr, SCALE_BF16: tl.constexpr):
    """Scale (fp32) and biased zero point (DTYPE) of group `group` of one tile's columns, [128, 1] each. One word holds both, so
    that it fits cp.async."""
    word = tl.load(tile_ptr + group * 128 + tl.arange(0, 128))[:, None]
    if SCALE_BF16:
        scale = word.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    else:
        scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return scale, zero


@triton.jit
def part_sum(
    x_base,  # [32, BLOCK_M] pointers to the first plane of the first tile
    tile_words,  # [128, 32] pointers to the words of the column tile's first tile
    group_tile,  # pointer to the column tile's group words
    first,
    last,
    K,
    slab,
    DTYPE: tl.constexpr,
    SCALE_BF16: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """fp32 [128, BLOCK_M]: the product over K tiles first to last - 1."""
    BF16: tl.constexpr = DTYPE == tl.bfloat16
    acc = tl.zeros((128, BLOCK_M), tl.float32)
    if GROUP == 0:
        only_scale, only_zero = load_group(group_tile, 0, DTYPE, SCALE_BF16)
    for k in range(first, last):
        words = tl.load(tile_words + k * (128 * 32), eviction_policy="evict_first")
        if GROUP == 0:
            scale0, zero0 = only_scale, only_zero
            scale1, zero1, scale2, zero2, scale3, zero3 = scale0, zero0, scale0, zero0, scale0, zero0
        elif GROUP % 128 == 0:
            scale0, zero0 = load_group(group_tile, k // (GROUP // 128), DTYPE, SCALE_BF16)
            scale1, zero1, scale2, zero2, scale3, zero3 = scale0, zero0, scale0, zero0, scale0, zero0
        elif GROUP == 64:
            scale0, zero0 = load_group(group_tile, 2 * k, DTYPE, SCALE_BF16)
            scale2, zero2 = load_group(group_tile, 2 * k + 1, DTYPE, SCALE_BF16)
            scale1, zero1, scale3, zero3 = scale0, zero0, scale2, zero2
        else:
            scale0, zero0 = load_group(group_tile, (4 * k) // (GROUP // 32), DTYPE, SCALE_BF16)
            scale1, zero1 = load_group(group_tile, (4 * k + 1) // (GROUP // 32), DTYPE, SCALE_BF16)
            scale2, zero2 = load_group(group_tile, (4 * k + 2) // (GROUP // 32), DTYPE, SCALE_BF16)
            scale3, zero3 = load_group(group_tile, (4 * k + 3) // (GROUP // 32), DTYPE, SCALE_BF16)
        w0, w1, w2, w3 = unpack_planes(words, zero0, zero1, zero2, zero3, USE_PTX, BF16)

        x_tile = x_base + k * 128
        if EVEN_K:
            x0 = tl.load(x_tile)
            x1 = tl.load(x_tile + 32)
            x2 = tl.load(x_tile + 64)
            x3 = tl.load(x_tile + 96)
        else:
            left = K - k * 128
            x0 = tl.load(x_tile, mask=(slab < left)[:, None], other=0.0)
            x1 = tl.load(x_tile + 32, mask=(slab + 32 < left)[:, None], other=0.0)
            x2 = tl.load(x_tile + 64, mask=(slab + 64 < left)[:, None], other=0.0)
            x3 = tl.load(x_tile + 96, mask=(slab + 96 < left)[:, None], other=0.0)

        if GROUP == 0:
            acc = tl.dot(w0, x0, acc)
            acc = tl.dot(w1, x1, acc)
            acc = tl.dot(w2, x2, acc)
            acc = tl.dot(w3, x3, acc)
        elif not SCALE_AFTER:
            acc = tl.dot(w0 * scale0.to(DTYPE), x0, acc)
            acc = tl.dot(w1 * scale1.to(DTYPE), x1, acc)
            acc = tl.dot(w2 * scale2.to(DTYPE), x2, acc)
            acc = tl.dot(w3 * scale3.to(DTYPE), x3, acc)
        elif GROUP % 128 == 0:
            product = tl.dot(w0, x0)
            product = tl.dot(w1, x1, product)
            product = tl.dot(w2, x2, product)
            product = tl.dot(w3, x3, product)
            acc += product * scale0
        elif GROUP == 64:
            product = tl.dot(w0, x0)
            product = tl.dot(w1, x1, product)
            acc += product * scale0
            product = tl.dot(w2, x2)
            product = tl.dot(w3, x3, product)
            acc += product * scale2
        else:
            acc += tl.dot(w0, x0) * scale0
            acc += tl.dot(w1, x1) * scale1
            acc += tl.dot(w2, x2) * scale2
            acc += tl.dot(w3, x3) * scale3
    if GROUP == 0:
        acc *= only_scale
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def awq_gemm_kernel(
    x_ptr,  # [rows, K] 16 bit
    words_ptr,  # int16 slabs; with experts [experts, ...]
    groups_ptr,  # int32 [N/128, groups, 128]: scale in the low half, -(1024 + z) or -(128 + z) in the high half
    bias_ptr,  # fp32 [N] or None; with experts [experts, N]
    out_ptr,  # [rows, N] 16 bit or fp32
    partials_ptr,  # fp32 workspace, one tile per program, when K is split over programs
    arrivals_ptr,  # int32 zeros, one per output tile, left at zero
    rows_ptr,  # int32: with experts, the output row of every slot, grouped by expert; -1 where a slot is empty. Else None
    experts_ptr,  # int32: with experts, the expert of every BLOCK_M slots; -1 where none
    num_rows,
    N,
    K,
    x_stride,
    out_stride,
    num_groups,
    TOP_K: tl.constexpr,  # with experts: output row // TOP_K is the row of x
    GROUP: tl.constexpr,  # group size, a multiple of 32; 0: one group spans K
    BLOCK_M: tl.constexpr,
    NUM_PARTS: tl.constexpr,  # parts that K is summed in
    SPLIT: tl.constexpr,  # each part by a program of its own, else one after the other: the same bits
    SCALE_AFTER: tl.constexpr,
    SCALE_BF16: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    BLOCK_N: tl.constexpr = 128
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tile_n = tl.program_id(0)
    tile_m = tl.program_id(1)
    part = tl.program_id(2)
    num_k = tl.cdiv(K, 128)

    slots = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = slots < num_rows
    # Rows past the end read row 0 and store nothing: no mask in the loop.
    if rows_ptr is None:
        out_rows = slots
        x_rows = tl.where(row_mask, slots, 0)
    else:
        expert = tl.load(experts_ptr + tile_m)
        if expert < 0:
            return
        out_rows = tl.load(rows_ptr + slots, mask=row_mask, other=-1)
        row_mask = out_rows >= 0
        x_rows = tl.where(row_mask, out_rows // TOP_K, 0)
        words_ptr += expert.to(tl.int64) * tl.num_programs(0) * num_k * (BLOCK_N * 32)
        groups_ptr += expert.to(tl.int64) * tl.num_programs(0) * num_groups * BLOCK_N

    slab = tl.arange(0, 32)
    x_base = x_ptr + x_rows[None, :].to(tl.int64) * x_stride + slab[:, None]
    tile_words = words_ptr + tile_n * num_k * (BLOCK_N * 32)
    tile_words = tile_words + tl.arange(0, BLOCK_N)[:, None] * 32 + slab[None, :]
    group_tile = groups_ptr + tile_n * num_groups * BLOCK_N
    per_part = tl.cdiv(num_k, NUM_PARTS)
    if SPLIT or NUM_PARTS == 1:
        first = part * per_part
        last = tl.minimum(first + per_part, num_k)
        acc = part_sum(
            x_base, tile_words, group_tile, first, last, K, slab,
            DTYPE, SCALE_BF16, GROUP, BLOCK_M, SCALE_AFTER, EVEN_K, USE_PTX,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for inner in range(NUM_PARTS):
            first = inner * per_part
            last = tl.minimum(first + per_part, num_k)
            acc += part_sum(
                x_base, tile_words, group_tile, first, last, K, slab,
                DTYPE, SCALE_BF16, GROUP, BLOCK_M, SCALE_AFTER, EVEN_K, USE_PTX,
            )  # fmt: skip

    if SPLIT and NUM_PARTS > 1:
        # Every part leaves its tile in the workspace; the last to arrive adds them up in their order, so the sum is always
        # the same.
        tile = tile_m * tl.num_programs(0) + tile_n
        in_tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tiles = partials_ptr + tile.to(tl.int64) * (NUM_PARTS * BLOCK_N * BLOCK_M) + in_tile
        tl.store(tiles + part * (BLOCK_N * BLOCK_M), acc)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") != NUM_PARTS - 1:
            return
        acc = tl.load(tiles, cache_modifier=".cg")
        for other in range(1, NUM_PARTS):
            acc += tl.load(tiles + other * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
        tl.store(arrivals_ptr + tile, 0)
    column_mask = columns < N
    if bias_ptr is not None:
        bias = bias_ptr + columns
        if rows_ptr is not None:
            bias += expert * N
        acc += tl.load(bias, mask=column_mask, other=0.0)[:, None]
    out = out_ptr + out_rows[None, :].to(tl.int64) * out_stride + columns[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_mask[None, :] & column_mask[:, None])


@triton.jit
def dequantize_kernel(
    words_ptr,  # int16 slabs
    groups_ptr,
    out_ptr,  # 16 bit [N, K]
    N,
    K,
    num_groups,
    GROUP: tl.constexpr,
    SCALE_BF16: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """One tile of the weight in 16 bit: (q - z) * s computed in fp32, rounded once."""
    BLOCK_N: tl.constexpr = 128
    SLAB: tl.constexpr = 32
    BF16: tl.constexpr = out_ptr.dtype.element_ty == tl.bfloat16
    tile_n = tl.program_id(0)
    k = tl.program_id(1)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    slab = tl.arange(0, SLAB)
    offsets = tl.arange(0, BLOCK_N)[:, None] * SLAB + slab[None, :]
    words = tl.load(words_ptr + (tile_n * tl.cdiv(K, 128) + k) * (BLOCK_N * SLAB) + offsets)
    group0, group1, group2, group3 = k * 0, k * 0, k * 0, k * 0
    if GROUP != 0:
        group0 = (128 * k) // GROUP
        group1 = (128 * k + 32) // GROUP
        group2 = (128 * k + 64) // GROUP
        group3 = (128 * k + 96) // GROUP
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    group_tile = groups_ptr + tile_n * num_groups * BLOCK_N
    s0, z0 = load_group(group_tile, group0, DTYPE, SCALE_BF16)
    s1, z1 = load_group(group_tile, group1, DTYPE, SCALE_BF16)
    s2, z2 = load_group(group_tile, group2, DTYPE, SCALE_BF16)
    s3, z3 = load_group(group_tile, group3, DTYPE, SCALE_BF16)
    w0, w1, w2, w3 = unpack_planes(words, z0, z1, z2, z3, USE_PTX, BF16)
    out = out_ptr + columns[:, None].to(tl.int64) * K + k * 128 + slab[None, :]
    mask = (columns < N)[:, None]
    left = K - k * 128
    tl.store(out, (w0.to(tl.float32) * s0).to(DTYPE), mask=mask & (slab < left)[None, :])
    tl.store(out + 32, (w1.to(tl.float32) * s1).to(DTYPE), mask=mask & (slab + 32 < left)[None, :])
    tl.store(out + 64, (w2.to(tl.float32) * s2).to(DTYPE), mask=mask & (slab + 64 < left)[None, :])
    tl.store(out + 96, (w3.to(tl.float32) * s3).to(DTYPE), mask=mask & (slab + 96 < left)[None, :])
