"""From sequences to the per-row sampling parameters that the back end reads, and the masks that come before it."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from kernels.backend import Backend, SamplingBatch
from server.engine.logits import LogitRules
from server.engine.sequence import Sequence

NOTHING_LEFT = "allowed_token_ids, bad_words, min_tokens and the grammar together leave no token to choose from"


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

    def mask(self, sequences: Rows[Sequence], logits: Tensor) -> dict[int, str]:
        """Changes `logits` [rows, vocabulary] in place where the sequences' rules ask. Returns, by row, why nothing is left to
        choose from where that is so."""
        rows: list[int] = []
        token_ids: list[int] = []
        errors: dict[int, str] = {}
        for row, sequence in enumerate(sequences):
            banned = self._banned(sequence)
            if sequence.matcher is not None:
                if not sequence.matcher.mask(logits[row]):
                    errors[row] = f"the grammar cannot go on: {sequence.matcher.error}"
                    continue
                if banned and not _leaves_any(logits[row], banned):
                    banned = []  # a grammar that has come to its end has nothing else to give
            if sequence.has_rules:
                if sequence.rules is None:
                    sequence.rules = LogitRules(sequence.sampling, sequence.request.prompt_token_ids)
                output = sequence.token_ids[sequence.num_prompt_tokens :]
                if not sequence.rules.apply(logits[row], output, banned, sequence.matcher is not None):
                    errors[row] = NOTHING_LEFT
            elif banned:
                rows += [row] * len(banned)
                token_ids += banned
        if rows:
            self.backend.ban_tokens(logits, rows, token_ids)
        return errors

    def _banned(self, sequence: Sequence) -> list[int]:
        """Tokens that would end the output before `min_tokens`."""
        if sequence.num_output_tokens >= sequence.sampling.min_tokens:
            return []
        return sorted(self.eos_token_ids | set(sequence.sampling.stop_token_ids))


def _leaves_any(row: Tensor, banned: list[int]) -> bool:
    """Whether a row has possible tokens besides these."""
    possible = row > -torch.inf
    possible[[token_id for token_id in banned if token_id < len(row)]] = False
    return bool(possible.any())
