"""What one step computes, and how much it may hold."""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

from server.engine.sequence import Sequence

MIN_CHUNK = 16
"""Tokens that a prompt advances by in a step even when decodes have used up the cost: nothing starves."""


@dataclass(frozen=True, slots=True)
class StepBudget:
    """What one step may hold. The unit of cost is one token's linear layers; attending to `balanced_context` keys costs as much
    again. An infinite `max_cost` leaves the number of tokens as the only limit."""

    max_tokens: int
    max_cost: float = math.inf
    balanced_context: float = math.inf

    def cost(self, start: int, num_tokens: int) -> float:
        """Of computing `num_tokens` tokens from position `start` on."""
        return num_tokens * (1.0 + (start + num_tokens / 2) / self.balanced_context)

    def affordable(self, start: int, cost: float) -> int:
        """The most tokens from `start` on whose cost is at most `cost`, and MIN_CHUNK at least."""
        if math.isinf(cost):
            return self.max_tokens
        if math.isinf(self.balanced_context):
            return max(MIN_CHUNK, int(cost))
        slope = 1.0 + start / self.balanced_context
        root = math.sqrt(slope * slope + 2.0 * max(cost, 0.0) / self.balanced_context)
        return max(MIN_CHUNK, int((root - slope) * self.balanced_context))


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """A row of logits that a token is sampled from: the one that follows the sequence's tokens and `drafts`."""

    sequence: Sequence
    drafts: tuple[int, ...] = ()

    @property
    def num_output_tokens(self) -> int:
        """Before the token that is sampled."""
        return self.sequence.num_output_tokens + len(self.drafts)

    @property
    def output(self) -> list[int]:
        return [*self.sequence.token_ids[self.sequence.num_prompt_tokens :], *self.drafts]


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """`num_new_tokens` tokens from position `start` on are computed in this step: the sequence's, then `drafts`."""

    sequence: Sequence
    start: int
    num_new_tokens: int
    drafts: tuple[int, ...] = ()

    @property
    def is_last_chunk(self) -> bool:
        """The newest token is computed."""
        return self.start + self.num_new_tokens - len(self.drafts) == self.sequence.num_tokens

    @property
    def samples(self) -> bool:
        return self.is_last_chunk and self.sequence.pooling is None

    @property
    def rows(self) -> list[SamplingRow]:
        """One after the newest token, and one after each draft."""
        if not self.samples:
            return []
        return [SamplingRow(self.sequence, self.drafts[:count]) for count in range(len(self.drafts) + 1)]

    @property
    def scored(self) -> range:
        """Positions of this step whose logits tell how likely the prompt's next token is, where the request asks for that."""
        sequence = self.sequence
        if not sequence.num_unscored_tokens:
            return range(0)
        end = min(self.start + self.num_new_tokens, sequence.num_prompt_tokens - 1)
        return range(max(self.start, len(sequence.prompt_logprobs)), end)


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """A step. Rows of logits belong to `rows`, in that order, and then to the entries' `scored` positions."""

    entries: list[ScheduledSequence]
    num_prefix_queries: int
    num_prefix_hits: int
    num_preemptions: int

    @property
    def rows(self) -> list[SamplingRow]:
        return [row for entry in self.entries for row in entry.rows]

    def only(self, pooling: bool) -> list[ScheduledSequence]:
        """The entries whose prompts are embedded, or those of sequences that generate."""
        return [entry for entry in self.entries if (entry.sequence.pooling is not None) == pooling]

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_new_tokens for entry in self.entries)


@dataclass(frozen=True, slots=True)
class StepForecast:
    """How long steps take by what was measured at load: `least_seconds` is a pass that reads all weights once."""

    budget: StepBudget  # with attention's price, whatever limits the steps
    seconds_per_token: float
    least_seconds: float

    def seconds(self, batch: ScheduledBatch) -> float:
        cost = sum(self.budget.cost(entry.start, entry.num_new_tokens) for entry in batch.entries)
        return max(self.least_seconds, cost * self.seconds_per_token)


class Step:
    """A step being filled."""

    def __init__(self, budget: StepBudget, max_rows: int) -> None:
        self.budget = budget
        self.entries: list[ScheduledSequence] = []
        self._rows_left = max_rows  # of logits
        self._tokens_left = budget.max_tokens
        self._cost_left = budget.max_cost

    @property
    def is_full(self) -> bool:
        """Also once the cost is used up by a chunk: MIN_CHUNK is for the first one."""
        return self._tokens_left == 0 or self._rows_left <= 0 or (self._cost_left <= 0 and not self._only_decodes)

    @property
    def _only_decodes(self) -> bool:
        return all(entry.sequence.is_decoding for entry in self.entries)

    def add(self, sequence: Sequence) -> None:
        start = sequence.num_computed_tokens
        affordable = self.budget.affordable(start, self._cost_left)
        num_new_tokens = min(sequence.num_uncomputed_tokens, self._tokens_left, affordable)
        if sequence.num_unscored_tokens:  # each of its tokens takes a row: half of them stay for others
            num_new_tokens = min(num_new_tokens, max(1, self._rows_left // 2))
        self.entries.append(ScheduledSequence(sequence, start, num_new_tokens))
        self._charge(self.entries[-1], 1)

    def room_for_drafts(self, max_rows: int) -> int:
        """Rows that drafts may take, `max_rows` at most: half of what decodes have left stays for prompts."""
        cost = self.budget.cost(0, 1)
        affordable = self._tokens_left if math.isinf(self._cost_left) else int(self._cost_left / cost)
        return max(0, min(max_rows, self._rows_left, self._tokens_left // 2, affordable // 2))

    def add_drafts(self, index: int, drafts: Rows[int]) -> None:
        """To the entry at `index`, whose sequence decodes."""
        entry = self.entries[index]
        assert entry.sequence.is_decoding and not entry.drafts
        self._charge(entry, -1)
        self.entries[index] = replace(entry, num_new_tokens=1 + len(drafts), drafts=tuple(drafts))
        self._charge(self.entries[index], 1)

    def remove(self, sequence: Sequence) -> None:
        """Takes a preempted sequence out again, if it is in."""
        for entry in self.entries:
            if entry.sequence is sequence:
                self._charge(entry, -1)
        self.entries = [entry for entry in self.entries if entry.sequence is not sequence]

    def _charge(self, entry: ScheduledSequence, sign: int) -> None:
        self._tokens_left -= sign * entry.num_new_tokens
        self._cost_left -= sign * self.budget.cost(entry.start, entry.num_new_tokens)
        takes_all_rows = entry.sequence.num_unscored_tokens or entry.drafts
        self._rows_left -= sign * (entry.num_new_tokens if takes_all_rows else 1)
