"""From hidden states, chunk by chunk, to the embeddings of prompts."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
from torch import Tensor

from server.engine.step import ScheduledSequence
from server.types import Pooling


class PooledStates:
    """One prompt's states so far. The sum is in fp64 and goes token by token, so that chunks do not show in it; a preempted
    sequence's tokens are computed again, and counted once."""

    def __init__(self, pooling: Pooling, hidden_size: int) -> None:
        self._pooling = pooling
        self._total = np.zeros(hidden_size, dtype=np.float64)
        self._num_tokens = 0  # that were taken in

    def add(self, start: int, states: np.ndarray) -> None:
        """states: fp32 [tokens, hidden], of positions `start` on."""
        end = start + len(states)
        if self._pooling is Pooling.LAST:
            self._total = states[-1].astype(np.float64)
        elif end > self._num_tokens:
            for row in states[self._num_tokens - start :]:
                self._total += row
        self._num_tokens = max(self._num_tokens, end)

    def embedding(self) -> list[float] | None:
        """At unit length, which makes a mean of the sum; zeros stay zeros. None where it is not finite."""
        length = np.sqrt(np.square(self._total).sum())
        if not np.isfinite(length):
            return None
        return (self._total / (length or 1.0)).astype(np.float32).tolist()


def pool_states(entries: Rows[ScheduledSequence], states: Tensor) -> None:
    """Gives each entry's sequence its rows. states: fp32 [tokens of all entries, hidden], in host memory."""
    rows = states.numpy()
    begin = 0
    for entry in entries:
        sequence, end = entry.sequence, begin + entry.num_new_tokens
        assert sequence.pooling is not None
        if sequence.pooled is None:
            sequence.pooled = PooledStates(sequence.pooling, rows.shape[1])
        sequence.pooled.add(entry.start, rows[begin:end])
        begin = end
