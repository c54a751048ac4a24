"""Paged attention in the interpreter against the reference: decode, prefill, mixed batches, windows, soft caps, head sizes,
int8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.backend import AttentionShape, BackendOptions, KVCacheSpec
from kernels.batch import ForwardBatch
from kernels.gpu import attention
from kernels.gpu.tuning import CHIPS, attention_config
from kernels.reference import DenseKVCache, ReferenceBackend
from tests.kernels.batches import BLOCK_SIZE, make_batch, make_tables

REFERENCE = ReferenceBackend(BackendOptions())
SCALE = 0.125


def paged(rows: Tensor, num_blocks: int) -> Tensor:
    """[slots, kv heads, ...] as [blocks, kv heads, block size, ...]."""
    return rows.unflatten(0, (num_blocks, BLOCK_SIZE)).transpose(1, 2).contiguous()


class Case:
    """One cache, filled by both sides from the same 16-bit qkv."""

    def __init__(self, seq_lens: list[int], shape: AttentionShape, dtype: torch.dtype, int8: bool = False) -> None:
        torch.manual_seed(sum(seq_lens) + shape.head_dim)
        self.shape, self.dtype, self.seq_lens = shape, dtype, seq_lens
        self.tables, num_blocks = make_tables(seq_lens)
        full = make_batch(seq_lens, seq_lens, self.tables)
        self.qkv = torch.randn(full.num_tokens, shape.q_size + 2 * shape.kv_size).to(dtype)
        pool = (num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        (self.reference,) = REFERENCE.allocate_kv(
            KVCacheSpec(1, num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        )
        assert isinstance(self.reference, DenseKVCache)
        self.q = REFERENCE.rope_and_store(self.qkv.float(), shape, None, None, full, self.reference).to(dtype)
        # What was never written must not be read: NaN, or the largest integer with a NaN scale.
        unwritten = torch.ones(num_blocks * BLOCK_SIZE, dtype=torch.bool)
        unwritten[full.slot_mapping.long()] = False
        self.cache: list[Tensor] = []
        self.scales: list[Tensor | None] = []
        for rows in (self.reference.keys, self.reference.values):
            scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
            if int8:
                stored = (rows / scale).round()
                rows.copy_(stored * scale)
                scale[unwritten] = torch.nan
                stored[unwritten] = 127
                self.scales.append(paged(scale, num_blocks)[..., 0].contiguous())
            else:
                stored = rows.clone()
                stored[unwritten] = torch.nan
                self.scales.append(None)
            self.cache.append(paged(stored, num_blocks).to(torch.int8 if int8 else dtype))
        assert self.cache[0].shape == pool

    def batch(self, query_lens: list[int]) -> tuple[ForwardBatch, Tensor]:
        batch = make_batch(query_lens, self.seq_lens, self.tables)
        picked, first = [], 0
        for query, length in zip(query_lens, self.seq_lens, strict=True):
            picked += range(first + length - query, first + length)
            first += length
        return batch, self.q[picked].contiguous()

    def run(
        self,
        query_lens: list[int],
        window: int = 0,
        soft_cap: float = 0.0,
        segment: int = 128,
        prefill_segment: int = 0,
        chip: str = "A100-80GB",
    ) -> tuple[Tensor, Tensor]:
        batch, q = self.batch(query_lens)
        shape = self.shape
        out = torch.full((q.shape[0], shape.q_size), float("nan"), dtype=self.dtype)
        num_segments = -(-max(self.seq_lens) // segment)
        sizes = attention.workspace_sizes(len(query_lens), shape.num_heads, shape.head_dim, num_segments)
        int8 = self.scales[0] is not None
        group = shape.num_heads // shape.num_kv_heads
        tile = attention_config(CHIPS[chip], shape.head_dim, group, prefill_segment > 0, int8)
        acc, stats = (torch.full((size,), float("nan")) for size in sizes)
        lists = (batch.block_tables, batch.seq_lens, batch.query_starts, batch.counts)
        attention.decode(
            q, *self.cache, *self.scales, *lists, acc, stats, out, len(query_lens), num_segments, segment, SCALE,
            window, soft_cap, tile.key_block, tile.decode_warps, tile.num_stages,
        )  # fmt: skip
        attention.prefill(
            q, *self.cache, *self.scales, *lists, out, prefill_segment, SCALE, window, soft_cap, tile.key_block, tile.rows,
            tile.prefill_warps, tile.num_stages,
        )  # fmt: skip
        expected = REFERENCE.attention(
            q.float(), shape, self.reference, batch, SCALE, window or None, soft_cap or None
        ).dense()
        return out, expected


def check(got: Tensor, expected: Tensor) -> None:
    bound = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[got.dtype]
    error = (got.float() - expected).abs().max().item()
    assert error < bound * max(1.0, expected.abs().max().item()), error


MIXED = ([1, 1, 37, 1, 5], [1, 150, 70, 257, 5])


@pytest.mark.parametrize(
    ("dtype", "int8"),
    [
        (torch.float16, False),
        pytest.param(torch.float16, True, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, False, marks=pytest.mark.slow),
        (torch.bfloat16, True),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "shape",
    [AttentionShape(4, 2, 64), AttentionShape(7, 1, 80), AttentionShape(3, 3, 96), AttentionShape(8, 2, 128)],
    ids=lambda shape: f"{shape.num_heads}-{shape.num_kv_heads}-{shape.head_dim}",
)
def test_mixed_batches(shape: AttentionShape, dtype: torch.dtype, int8: bool) -> None:
    query_lens, seq_lens = MIXED
    check(*Case(seq_lens, shape, dtype, int8).run(query_lens))


def test_large_heads() -> None:
    check(*Case([40, 90], AttentionShape(4, 1, 256), torch.float16).run([9, 1]))


def test_small_tiles_of_chips_without_tensor_cores() -> None:
    query_lens, seq_lens = MIXED
    check(*Case(seq_lens, AttentionShape(7, 1, 64), torch.float16).run(query_lens, window=90, chip="T4"))


@pytest.mark.parametrize(("window", "soft_cap"), [(40, 0.0), (1, 0.0), (0, 2.0), (130, 5.0)])
def test_windows_and_soft_caps(window: int, soft_cap: float) -> None:
    query_lens, seq_lens = MIXED
    case = Case(seq_lens, AttentionShape(4, 2, 64), torch.float16)
    check(*case.run(query_lens, window, soft_cap))
    check(*case.run(query_lens, window, soft_cap, prefill_segment=128))


@pytest.mark.parametrize("window", [0, 70])
def test_batch_invariant_bits(window: int) -> None:
    """With one segmentation a row's bits are the same decoded, in a chunk of any size and whole."""
    case = Case([5, 330], AttentionShape(4, 2, 64), torch.float16)
    whole, expected = case.run([5, 330], window, prefill_segment=128)
    check(whole, expected)
    for query in (1, 2, 17, 40, 200):
        got, _ = case.run([1, query], window, prefill_segment=128)
        assert torch.equal(got[1:], whole[-query:]), query
        assert torch.equal(got[0], whole[4])


def test_a_wrong_block_table_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison's own test: one entry of one table off by one."""
    case = Case([64, 150], AttentionShape(4, 2, 64), torch.float16)
    got, expected = case.run([1, 20])
    check(got, expected)
    original = Case.batch

    def planted(self: Case, query_lens: list[int]) -> tuple[ForwardBatch, Tensor]:
        batch, q = original(self, query_lens)
        batch.block_tables[1, 2] = (batch.block_tables[1, 2] + 1) % case.cache[0].shape[0]
        return batch, q

    monkeypatch.setattr(Case, "batch", planted)
    wrong, _ = case.run([1, 20])
    with pytest.raises(AssertionError):
        check(wrong, expected)
