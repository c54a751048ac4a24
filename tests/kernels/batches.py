"""Forward batches for kernel tests: sequences over a shuffled pool."""

from __future__ import annotations

import random

import torch

from kernels.batch import ForwardBatch

BLOCK_SIZE = 16


def make_tables(seq_lens: list[int], seed: int = 0, block_size: int = BLOCK_SIZE) -> tuple[list[list[int]], int]:
    """A block table per sequence, with blocks in random order, and the pool's size (one spare block at least)."""
    counts = [-(-length // block_size) for length in seq_lens]
    blocks = list(range(sum(counts) + 1))
    random.Random(seed).shuffle(blocks)
    tables = []
    for count in counts:
        tables.append([blocks.pop() for _ in range(count)])
    return tables, sum(counts) + 1


def make_batch(
    query_lens: list[int],
    seq_lens: list[int],
    tables: list[list[int]],
    logit_rows: list[int] | None = None,
    input_ids: list[int] | None = None,
    max_tokens: int | None = None,
    block_size: int = BLOCK_SIZE,
) -> ForwardBatch:
    """The last `query_lens[s]` tokens of sequences with `seq_lens[s]` keys."""
    positions: list[int] = []
    slots: list[int] = []
    for query, length, table in zip(query_lens, seq_lens, tables, strict=True):
        positions += range(length - query, length)
        slots += [table[p // block_size] * block_size + p % block_size for p in range(length - query, length)]
    num_tokens = len(positions)
    batch = ForwardBatch.allocate(
        max_tokens or num_tokens,
        max(len(query_lens), 1),
        max(map(len, tables)),
        max(len(logit_rows or []), len(query_lens), 1),
        torch.device("cpu"),
    )
    ends = [sum(query_lens[: s + 1]) - 1 for s in range(len(query_lens))]
    batch.fill(
        input_ids if input_ids is not None else [0] * num_tokens,
        positions,
        slots,
        query_lens,
        seq_lens,
        tables,
        ends if logit_rows is None else logit_rows,
    )
    return batch
