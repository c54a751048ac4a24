"""From sequences to the per-row sampling parameters that the back end reads, and the masks that come before it."""

from __future__ import annotations

from collections.abc import Sequence as Rows

from torch import Tensor

from kernels.backend import Backend, SamplingBatch
from server.engine.sequence import Sequence


class Sampler:
    """Fills the sampling buffers. What a row samples depends on its logits, its sequence's parameters and history alone."""

    def __init__(self, backend: Backend, batch: SamplingBatch, eos_token_ids: frozenset[int]) -> None:
        self.backend = backend
        self.batch = batch
        self.eos_token_ids = eos_token_ids

    def fill(self, sequences: Rows[Sequence]) -> SamplingBatch:
        """One row per sequence, for its next token. Before the program runs, which takes the buffers to the device."""
        params = [sequence.sampling for sequence in sequences]
        self.batch.fill(
            temperature=[p.temperature for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            seed=[sequence.seed for sequence in sequences],
            index=[sequence.num_output_tokens for sequence in sequences],
        )
        return self.batch

    def mask(self, sequences: Rows[Sequence], logits: Tensor) -> None:
        """Masks `logits` [rows, vocabulary] in place where rules ask."""
        rows: list[int] = []
        token_ids: list[int] = []
        for row, sequence in enumerate(sequences):
            if sequence.num_output_tokens < sequence.sampling.min_tokens:
                banned = sorted(self.eos_token_ids | set(sequence.sampling.stop_token_ids))
                rows += [row] * len(banned)
                token_ids += banned
        if rows:
            self.backend.ban_tokens(logits, rows, token_ids)
