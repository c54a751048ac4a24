"""From a scheduled step to the buffers that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence as Rows

from kernels.batch import ForwardBatch
from server.engine.step import ScheduledSequence


def fill_forward_batch(forward: ForwardBatch, entries: Rows[ScheduledSequence], block_size: int) -> None:
    """Writes entries of a step into `forward`: one logits row per sequence that samples, at its last token, and one at each of its
    drafts; after those one per scored position."""
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_lens: list[int] = []
    seq_lens: list[int] = []
    logit_rows: list[int] = []
    scored_rows: list[int] = []
    for entry in entries:
        sequence, start, end = entry.sequence, entry.start, entry.start + entry.num_new_tokens
        input_ids += sequence.token_ids[start:end]
        input_ids += entry.drafts
        positions += range(start, end)
        slots += slot_range(sequence.block_table, start, end, block_size)
        query_lens.append(end - start)
        seq_lens.append(end)
        if entry.samples:
            logit_rows += range(len(input_ids) - 1 - len(entry.drafts), len(input_ids))
        scored_rows += (len(input_ids) - end + position for position in entry.scored)
    tables = [entry.sequence.block_table for entry in entries]
    forward.fill(input_ids, positions, slots, query_lens, seq_lens, tables, logit_rows + scored_rows)


def slot_range(block_table: list[int], start: int, end: int, block_size: int) -> list[int]:
    """Slots of positions start to end - 1: block after block, each a run of consecutive slots."""
    slots: list[int] = []
    while start < end:
        block, offset = divmod(start, block_size)
        length = min(block_size - offset, end - start)
        first = block_table[block] * block_size + offset
        slots += range(first, first + length)
        start += length
    return slots
