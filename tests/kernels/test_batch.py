"""Buffers of a step."""

from __future__ import annotations

import torch

from kernels.batch import ForwardBatch


def test_block_tables_follow_every_change() -> None:
    """A table that stands is not written again; one that grows, shrinks, changes or moves to another row is."""
    batch = ForwardBatch.allocate(8, 3, 4, 3, torch.device("cpu"))
    for tables in (
        [[1], [2, 3]],
        [[1, 4], [2, 3]],
        [[2, 3]],
        [[1, 4], [2, 5], [6]],
        [[6], [1]],
        [[6, 7, 8], [1, 4, 9, 0]],
    ):
        count = len(tables)
        rows = list(range(count))
        batch.fill(rows, rows, rows, [1] * count, [1] * count, tables, rows)
        assert [batch.block_tables[row, : len(table)].tolist() for row, table in enumerate(tables)] == tables


def test_a_table_is_compared_with_what_was_written() -> None:
    """The sequence's own list grows in place."""
    batch, table = ForwardBatch.allocate(8, 1, 4, 1, torch.device("cpu")), [3]
    for block in (5, 7):
        batch.fill([0], [0], [0], [1], [1], [table], [0])
        table.append(block)
    batch.fill([0], [0], [0], [1], [1], [table], [0])
    assert batch.block_tables[0, :3].tolist() == [3, 5, 7]
