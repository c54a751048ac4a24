"""Attention over the paged cache: decoding split over segments of keys, and prefill of chunks of any lengths.

Both are an online softmax (arXiv 1805.02867) over blocks of keys aligned to position 0. Decoding computes each segment of keys
in a program of its own and merges the segments in their order. Prefill walks all keys at once, or, with `segment` given,
segment by segment with the same merge: then a row's bits are those of decoding.

Query heads that share a KV head form the rows of one product, so keys and values are read once per group.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.fused import tanh
from kernels.gpu.launch import launch
from kernels.gpu.library import define, expect

SEGMENT_MULTIPLE = 64
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """int8 to DTYPE without an integer conversion: x + 128 set into the mantissa of 2^23, minus 2^23 + 128."""
    bits = (x.to(tl.int32) & 0xFF) ^ 0x80
    return ((bits | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0).to(DTYPE)


@triton.jit
def attend(
    q,  # [ROWS, BLOCK_D]
    positions,  # int32 [ROWS]
    first,  # multiple of KEYS
    last,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    table_ptr,
    kv_head,
    seq_len,
    scale,
    soft_cap,
    window,
    ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Maximum (base 2), sum and weighted values over keys first to last - 1. Keys nobody sees add exact zeros."""
    channels = tl.arange(0, BLOCK_D)
    in_block = tl.arange(0, KEYS)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    DTYPE: tl.constexpr = q.dtype
    for start in range(first, last, KEYS):
        keys = start + in_block
        exists = keys < seq_len
        block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        rows = (block * KV_HEADS + kv_head) * BLOCK_SIZE + keys % BLOCK_SIZE
        key_offsets = rows[None, :] * D + channels[:, None]
        value_offsets = rows[:, None] * D + channels[None, :]
        if D == BLOCK_D:
            k = tl.load(key_ptr + key_offsets, mask=exists[None, :], other=0)
            v = tl.load(value_ptr + value_offsets, mask=exists[:, None], other=0)
        else:
            k = tl.load(key_ptr + key_offsets, mask=exists[None, :] & (channels < D)[:, None], other=0)
            v = tl.load(value_ptr + value_offsets, mask=exists[:, None] & (channels < D)[None, :], other=0)
        if key_scale_ptr is not None:
            scores = tl.dot(q, widen(k, DTYPE)) * tl.load(key_scale_ptr + rows, mask=exists, other=0.0)[None, :]
        else:
            scores = tl.dot(q, k)
        if SOFT_CAP:
            scores = soft_cap * tanh(scores * (scale / soft_cap)) * _LOG2_E
        else:
            scores = scores * (scale * _LOG2_E)
        visible = keys[None, :] <= positions[:, None]
        if WINDOW:
            visible = visible & (keys[None, :] > positions[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - finite[:, None])
        factor = tl.exp2(maximum - finite)
        total = total * factor + tl.sum(weights, 1)
        if value_scale_ptr is not None:
            weights = weights * tl.load(value_scale_ptr + rows, mask=exists, other=0.0)[None, :]
            v = widen(v, DTYPE)
        acc = tl.dot(weights.to(DTYPE), v, acc * factor[:, None])
        maximum = new_maximum
    return maximum, total, acc


@triton.jit
def merge(maximum, total, acc, other_maximum, other_total, other_acc):
    """Folds a later segment into what came before it."""
    new_maximum = tl.maximum(maximum, other_maximum)
    finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    left = tl.exp2(maximum - finite)
    right = tl.exp2(other_maximum - finite)
    return new_maximum, total * left + other_total * right, acc * left[:, None] + other_acc * right[:, None]


@triton.jit(do_not_specialize=["window", "table_stride"])
def decode_kernel(
    q_ptr,  # 16 bit [tokens, heads, D]
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    tables_ptr,
    seq_lens_ptr,
    query_starts_ptr,
    counts_ptr,
    acc_ptr,  # fp32 [sequences, kv heads, segments, GROUP, D]
    stats_ptr,  # fp32 [sequences, kv heads, segments, 2, GROUP]: maximum and sum
    scale,
    soft_cap,
    window,
    table_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """One segment of keys of one sequence and KV head. Sequences with more than one query token are the prefill kernel's."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    segment = tl.program_id(2)
    if sequence >= tl.load(counts_ptr + 1):
        return
    token = tl.load(query_starts_ptr + sequence)
    if tl.load(query_starts_ptr + sequence + 1) - token != 1:
        return
    seq_len = tl.load(seq_lens_ptr + sequence)
    first = segment * SEGMENT
    if first >= seq_len:
        return
    last = tl.minimum(first + SEGMENT, seq_len)
    if WINDOW:
        first = tl.maximum(first, (tl.maximum(seq_len - window, 0) // KEYS) * KEYS)
        if first >= last:
            return
    GROUP: tl.constexpr = HEADS // KV_HEADS
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_D)
    q_offsets = (token.to(tl.int64) * HEADS + kv_head * GROUP + rows)[:, None] * D + channels[None, :]
    q = tl.load(q_ptr + q_offsets, mask=(rows < GROUP)[:, None] & (channels < D)[None, :], other=0.0)
    positions = tl.zeros((ROWS,), tl.int32) + (seq_len - 1)
    maximum, total, acc = attend(
        q, positions, first, last, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr,
        tables_ptr + sequence * table_stride, kv_head, seq_len, scale, soft_cap, window,
        ROWS, KV_HEADS, D, BLOCK_D, BLOCK_SIZE, KEYS, WINDOW, SOFT_CAP,
    )  # fmt: skip
    place = (sequence.to(tl.int64) * KV_HEADS + kv_head) * tl.num_programs(2) + segment
    acc_offsets = (place * GROUP + rows)[:, None] * D + channels[None, :]
    tl.store(acc_ptr + acc_offsets, acc, mask=(rows < GROUP)[:, None] & (channels < D)[None, :])
    tl.store(stats_ptr + place * (2 * GROUP) + rows, maximum, mask=rows < GROUP)
    tl.store(stats_ptr + place * (2 * GROUP) + GROUP + rows, total, mask=rows < GROUP)


@triton.jit(do_not_specialize=["window", "num_segments"])
def merge_kernel(
    acc_ptr,
    stats_ptr,
    seq_lens_ptr,
    query_starts_ptr,
    counts_ptr,
    out_ptr,  # 16 bit [tokens, heads * D]
    window,
    num_segments,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    if sequence >= tl.load(counts_ptr + 1):
        return
    token = tl.load(query_starts_ptr + sequence)
    if tl.load(query_starts_ptr + sequence + 1) - token != 1:
        return
    seq_len = tl.load(seq_lens_ptr + sequence)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_D)
    mask = (rows < GROUP)[:, None] & (channels < D)[None, :]
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    first = 0
    if WINDOW:
        first = ((tl.maximum(seq_len - window, 0) // KEYS) * KEYS) // SEGMENT
    for segment in range(first, tl.cdiv(seq_len, SEGMENT)):
        place = (sequence.to(tl.int64) * KV_HEADS + kv_head) * num_segments + segment
        other = tl.load(acc_ptr + (place * GROUP + rows)[:, None] * D + channels[None, :], mask=mask, other=0.0)
        other_maximum = tl.load(stats_ptr + place * (2 * GROUP) + rows, mask=rows < GROUP, other=float("-inf"))
        other_total = tl.load(stats_ptr + place * (2 * GROUP) + GROUP + rows, mask=rows < GROUP, other=0.0)
        maximum, total, acc = merge(maximum, total, acc, other_maximum, other_total, other)
    out_offsets = (token.to(tl.int64) * HEADS + kv_head * GROUP + rows)[:, None] * D + channels[None, :]
    tl.store(out_ptr + out_offsets, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["window", "table_stride"])
def prefill_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    tables_ptr,
    seq_lens_ptr,
    query_starts_ptr,
    counts_ptr,
    out_ptr,
    scale,
    soft_cap,
    window,
    table_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    SEGMENT: tl.constexpr,  # 0: all keys in one pass
    ROWS: tl.constexpr,
    MAX_SEQUENCES: tl.constexpr,  # power of two
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """A tile of ROWS // GROUP query tokens, all heads of one KV head. Which sequence it belongs to, the kernel finds by
    itself from the query starts; sequences with one query token have no tiles here."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKENS: tl.constexpr = ROWS // GROUP
    sequences = tl.arange(0, MAX_SEQUENCES)
    is_used = sequences < tl.load(counts_ptr + 1)
    starts = tl.load(query_starts_ptr + sequences, mask=is_used, other=0)
    lengths = tl.load(query_starts_ptr + sequences + 1, mask=is_used, other=0) - starts
    tiles = tl.where(lengths > 1, (lengths + (TOKENS - 1)) // TOKENS, 0)
    ends = tl.cumsum(tiles, 0)
    sequence = tl.sum((ends <= tile).to(tl.int32), 0)
    if sequence >= MAX_SEQUENCES:
        return
    is_mine = sequences == sequence
    tile = tile - tl.sum(tl.where(is_mine, ends - tiles, 0), 0)
    start = tl.sum(tl.where(is_mine, starts, 0), 0)
    length = tl.sum(tl.where(is_mine, lengths, 0), 0)
    seq_len = tl.load(seq_lens_ptr + sequence)

    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_D)
    query = tile * TOKENS + rows // GROUP
    is_row = (rows < TOKENS * GROUP) & (query < length)
    positions = tl.where(is_row, seq_len - length + query, -1)
    offsets = ((start + query).to(tl.int64) * HEADS + kv_head * GROUP + rows % GROUP)[:, None] * D + channels[None, :]
    mask = is_row[:, None] & (channels < D)[None, :]
    q = tl.load(q_ptr + offsets, mask=mask, other=0.0)
    oldest = seq_len - length + tile * TOKENS
    last = tl.minimum(oldest + TOKENS, seq_len)
    first = 0
    if WINDOW:
        first = (tl.maximum(oldest + 1 - window, 0) // KEYS) * KEYS
    table_ptr = tables_ptr + sequence * table_stride
    if SEGMENT == 0:
        maximum, total, acc = attend(
            q, positions, first, last, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, table_ptr, kv_head, seq_len,
            scale, soft_cap, window, ROWS, KV_HEADS, D, BLOCK_D, BLOCK_SIZE, KEYS, WINDOW, SOFT_CAP,
        )  # fmt: skip
    else:
        maximum = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for segment in range(first // SEGMENT, tl.cdiv(last, SEGMENT)):
            other_maximum, other_total, other = attend(
                q, positions, tl.maximum(first, segment * SEGMENT), tl.minimum(last, (segment + 1) * SEGMENT),
                key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, table_ptr, kv_head, seq_len,
                scale, soft_cap, window, ROWS, KV_HEADS, D, BLOCK_D, BLOCK_SIZE, KEYS, WINDOW, SOFT_CAP,
            )  # fmt: skip
            maximum, total, acc = merge(maximum, total, acc, other_maximum, other_total, other)
    total = tl.where(is_row, total, 1.0)
    tl.store(out_ptr + offsets, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def _max_registers(num_warps: int) -> int | None:
    """All that a thread may have, said aloud: left to itself the compiler spills a few for more programs."""
    return 255 if num_warps <= 8 else None


def decode_rows(heads: int, kv_heads: int) -> int:
    return max(16, triton.next_power_of_2(heads // kv_heads))


def workspace_sizes(max_sequences: int, heads: int, head_dim: int, num_segments: int) -> tuple[int, int]:
    """fp32 values of the decode kernel's two workspaces."""
    places = max_sequences * heads * num_segments
    return places * head_dim, 2 * places


def _decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    tables: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    counts: Tensor,
    acc: Tensor,
    stats: Tensor,
    out: Tensor,
    num_sequences: int,
    num_segments: int,
    segment: int,
    scale: float,
    window: int,
    soft_cap: float,
    key_block: int,
    num_warps: int,
    num_stages: int,
) -> None:
    heads, head_dim = q.shape[1:]
    _, kv_heads, block_size, _ = keys.shape
    rows = decode_rows(heads, kv_heads)
    needed = workspace_sizes(num_sequences, heads, head_dim, num_segments)
    expect(
        acc.numel() >= needed[0] and stats.numel() >= needed[1],
        "attention_decode",
        f"workspaces hold {acc.numel()} and {stats.numel()} values, not {needed}",
    )
    expect(
        segment % SEGMENT_MULTIPLE == 0,
        "attention_decode",
        f"segment {segment} is not a multiple of {SEGMENT_MULTIPLE}",
    )
    constants = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "KEYS": key_block,
        "SEGMENT": segment,
        "ROWS": rows,
        "WINDOW": window > 0,
    }
    launch(
        decode_kernel, (num_sequences, kv_heads, num_segments), q, keys, values, key_scales, value_scales, tables,
        seq_lens, query_starts, counts, acc, stats, scale, soft_cap, window, tables.stride(0), **constants,
        BLOCK_SIZE=block_size, SOFT_CAP=soft_cap > 0,
        num_warps=num_warps, num_stages=num_stages, max_registers=_max_registers(num_warps),
    )  # fmt: skip
    launch(
        merge_kernel, (num_sequences, kv_heads), acc, stats, seq_lens, query_starts, counts, out, window, num_segments,
        **constants, num_warps=4, num_stages=1,
    )  # fmt: skip


def _prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    tables: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    counts: Tensor,
    out: Tensor,
    segment: int,
    scale: float,
    window: int,
    soft_cap: float,
    key_block: int,
    rows: int,
    num_warps: int,
    num_stages: int,
) -> None:
    tokens, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = keys.shape
    group = heads // kv_heads
    max_sequences = seq_lens.shape[0]
    expect(
        segment % SEGMENT_MULTIPLE == 0,
        "attention_prefill",
        f"segment {segment} is not a multiple of {SEGMENT_MULTIPLE}",
    )
    # Every sequence with several tokens may end in a partial tile, and has two tokens at least.
    max_tiles = tokens // (rows // group) + min(max_sequences, tokens // 2)
    launch(
        prefill_kernel, (max_tiles, kv_heads), q, keys, values, key_scales, value_scales, tables, seq_lens,
        query_starts, counts, out, scale, soft_cap, window, tables.stride(0), HEADS=heads, KV_HEADS=kv_heads,
        D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size, KEYS=key_block, SEGMENT=segment,
        ROWS=rows, MAX_SEQUENCES=triton.next_power_of_2(max_sequences), WINDOW=window > 0, SOFT_CAP=soft_cap > 0,
        num_warps=num_warps, num_stages=num_stages, max_registers=_max_registers(num_warps),
    )  # fmt: skip


_CACHE = "Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, Tensor tables, Tensor seq_lens, "
decode = define(
    f"attention_decode(Tensor q, {_CACHE}Tensor query_starts, Tensor counts, Tensor(a!) acc, Tensor(b!) stats, "
    "Tensor(c!) out, int num_sequences, int num_segments, int segment, float scale, int window, float soft_cap, "
    "int key_block, int num_warps, int num_stages) -> ()",
    _decode,
)
prefill = define(
    f"attention_prefill(Tensor q, {_CACHE}Tensor query_starts, Tensor counts, Tensor(a!) out, int segment, "
    "float scale, int window, float soft_cap, int key_block, int rows, int num_warps, int num_stages) -> ()",
    _prefill,
)
