"""Pools and tables of more elements than 32 bits count: pages that nothing touches take no memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from kernels.gpu import attention, fused
from tests.kernels.batches import BLOCK_SIZE, make_batch

HEADS, HEAD_DIM, LENGTH = 2, 64, 40


@pytest.fixture(autouse=True)
def without_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter copies all arguments back onto themselves, which would touch every page."""
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    yield


def attend_in(num_blocks: int) -> tuple[Tensor, Tensor]:
    """Writes a sequence to the last blocks of an int8 pool; its tokens' attention by prefill, and the last one's by decoding."""
    torch.manual_seed(0)
    pool = [torch.empty(num_blocks, 1, BLOCK_SIZE, HEAD_DIM, dtype=torch.int8) for _ in range(2)]
    scales = [torch.empty(num_blocks, 1, BLOCK_SIZE) for _ in range(2)]
    table = [num_blocks - 1, num_blocks - 3, num_blocks - 2]
    batch = make_batch([LENGTH], [LENGTH], [table])
    qkv = torch.randn(LENGTH, (HEADS + 2) * HEAD_DIM).half()
    q = torch.empty(LENGTH, HEADS, HEAD_DIM).half()
    fused.rope_and_store(
        qkv, q, *pool, *scales, None, None, None, None, batch.positions, batch.slot_mapping, batch.counts, 0.0, False
    )
    out = torch.empty(LENGTH, HEADS * HEAD_DIM).half()
    lists = (batch.block_tables, batch.seq_lens, batch.query_starts, batch.counts)
    attention.prefill(q, *pool, *scales, *lists, out, 0, 0.125, 0, 0.0, 64, 32, 4, 1)
    last = make_batch([1], [LENGTH], [table])
    lists = (last.block_tables, last.seq_lens, last.query_starts, last.counts)
    acc, stats = (torch.empty(size) for size in attention.workspace_sizes(1, HEADS, HEAD_DIM, 1))
    decoded = torch.empty(1, HEADS * HEAD_DIM).half()
    attention.decode(
        q[-1:].contiguous(), *pool, *scales, *lists, acc, stats, decoded, 1, 1, 64, 0.125, 0, 0.0, 64, 4, 1
    )
    return out, decoded


def test_a_pool_of_more_than_2_to_the_31_elements() -> None:
    small, large = attend_in(5), attend_in((1 << 31) // (BLOCK_SIZE * HEAD_DIM) + 50)
    for few, many in zip(small, large, strict=True):
        assert few.isfinite().all() and torch.equal(few, many)


def test_a_table_of_more_than_2_to_the_31_elements() -> None:
    rows = (1 << 31) // 64 + 8
    table, out = torch.empty(rows, 64, dtype=torch.float16), torch.empty(2, 64, dtype=torch.float16)
    table[-1], table[3] = 1.5, 2.5
    fused.embed(torch.tensor([rows - 1, 3], dtype=torch.int32), table, 1.0, out)
    assert (out[0] == 1.5).all() and (out[1] == 2.5).all()
    picked = torch.empty(2, 64, dtype=torch.float16)
    fused.gather_rows(table, torch.tensor([rows - 1, 3]).int(), torch.tensor([2, 1, 2]).int(), picked)
    assert torch.equal(picked, out)
