"""Which sequences compute which tokens in the next step, and what follows from the tokens sampled.

One budget per step is shared by decodes (first), prefill chunks of running sequences, and newly admitted ones, first come first
served: a number of tokens and, so that a long prompt does not stall everybody's next token, a cost that stands for time.

Admission is optimistic: a sequence needs blocks for the tokens it has, not for those it may generate. When a running sequence
finds no block, the youngest running one is preempted: its blocks are freed and it is computed anew later, the prefix cache
permitting with little work. A sequence alone always fits: the pool holds max_model_len tokens at least.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

from server.engine.block_manager import BlockManager
from server.engine.sequence import Sequence, SequenceStatus
from server.types import FinishReason, StepStats, TokenEvent, TokenLogprob

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
class ScheduledSequence:
    """`num_new_tokens` tokens of the sequence from position `start` on are computed in this step."""

    sequence: Sequence
    start: int
    num_new_tokens: int

    @property
    def is_last_chunk(self) -> bool:
        """The newest token is computed, so this sequence samples."""
        return self.start + self.num_new_tokens == self.sequence.num_tokens

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
    """A step. Rows of logits belong to `sampling`, in that order, and then to the entries' `scored` positions."""

    entries: list[ScheduledSequence]
    num_prefix_queries: int
    num_prefix_hits: int
    num_preemptions: int

    @property
    def sampling(self) -> list[Sequence]:
        return [entry.sequence for entry in self.entries if entry.is_last_chunk]

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_new_tokens for entry in self.entries)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the runner gives back for one row: a token, or None where the logits were not finite."""

    token_id: int | None
    logprob: TokenLogprob | None = None
    error: str | None = None  # where the request's own rules left nothing to choose


class _Step:
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

    def remove(self, sequence: Sequence) -> None:
        """Takes a preempted sequence out again, if it is in."""
        for entry in self.entries:
            if entry.sequence is sequence:
                self._charge(entry, -1)
        self.entries = [entry for entry in self.entries if entry.sequence is not sequence]

    def _charge(self, entry: ScheduledSequence, sign: int) -> None:
        self._tokens_left -= sign * entry.num_new_tokens
        self._cost_left -= sign * self.budget.cost(entry.start, entry.num_new_tokens)
        self._rows_left -= sign * (entry.num_new_tokens if entry.sequence.num_unscored_tokens else 1)


class Scheduler:
    """Two queues and a block manager. `schedule`, compute, `postprocess`; `add` and `finish` in between."""

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        budget: StepBudget,
        max_model_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        assert 0 < max_num_seqs <= budget.max_tokens
        assert block_manager.num_blocks * block_manager.block_size >= max_model_len
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.budget = budget
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        assert sequence.num_prompt_tokens < self.max_model_len
        self.waiting.append(sequence)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # Before the step.
    def schedule(self, now: float) -> ScheduledBatch:
        step = _Step(self.budget, self.max_num_seqs)
        num_preemptions = 0
        # Decodes before chunks; within each, the order of admission. Preemption takes from the end of `running`.
        for sequence in sorted(self.running, key=lambda s: not s.is_decoding):
            if step.is_full:
                break
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted by an earlier one in this very loop
            while not self.block_manager.can_extend(sequence):
                victim = self._preempt_youngest()
                step.remove(victim)
                num_preemptions += 1
                if victim is sequence:
                    break
            if sequence.status is SequenceStatus.RUNNING:
                self.block_manager.extend(sequence)
                step.add(sequence)
        queries = hits = 0
        while not num_preemptions and not step.is_full:
            admitted = self._admit(now)
            if admitted is None:
                break
            queries += admitted.num_tokens
            hits += admitted.num_computed_tokens
            step.add(admitted)
        return ScheduledBatch(step.entries, queries, hits, num_preemptions)

    def _admit(self, now: float) -> Sequence | None:
        """Moves the first waiting sequence to running, if a seat and blocks are there. A sibling whose leader is still filling
        their common blocks is stepped over, and keeps its place."""
        if len(self.running) >= self.max_num_seqs:
            return None
        for index, sequence in enumerate(self.waiting):
            if self._waits_for_sibling(sequence):
                continue
            # What the cache holds is not computed, and so cannot be scored.
            prefix = [] if sequence.num_unscored_tokens else self.block_manager.find_prefix(sequence)
            if not self.block_manager.can_allocate(sequence, prefix):
                return None
            del self.waiting[index]
            self.block_manager.allocate(sequence, prefix)
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
                sequence.num_cached_tokens = sequence.num_computed_tokens
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            return sequence
        return None

    def _waits_for_sibling(self, sequence: Sequence) -> bool:
        group, size = sequence.request.group_id, self.block_manager.block_size
        shared = (sequence.num_prompt_tokens - 1) // size * size
        if not group or not shared or not self.block_manager.enable_prefix_caching:
            return False
        return any(other.request.group_id == group and other.num_computed_tokens < shared for other in self.running)

    def _preempt_youngest(self) -> Sequence:
        victim = self.running.pop()
        self.block_manager.free(victim)
        victim.status = SequenceStatus.WAITING
        victim.num_preemptions += 1
        self.waiting.appendleft(victim)
        return victim

    # After the step.
    def postprocess(self, batch: ScheduledBatch, sampled: Rows[SampledToken], now: float) -> list[TokenEvent]:
        """Counts what was computed, publishes full blocks, appends the sampled tokens and ends what is done.

        `sampled` has one entry per sequence of `batch.sampling`. Sequences that ended while the step ran are passed over.
        """
        events: list[TokenEvent] = []
        rows = iter(sampled)
        for entry in batch.entries:
            sequence = entry.sequence
            row = next(rows) if entry.is_last_chunk else None
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            sequence.num_computed_tokens = entry.start + entry.num_new_tokens
            self.block_manager.publish(sequence, entry.start)
            if row is not None:
                events.append(self._append(sequence, row, now))
        return events

    def _append(self, sequence: Sequence, row: SampledToken, now: float) -> TokenEvent:
        error = row.error
        if error is None and row.token_id is not None and sequence.matcher is not None:
            error = None if sequence.matcher.accept(row.token_id) else sequence.matcher.error
        if error is not None:
            event = self.finish(sequence, FinishReason.ERROR, now, error=error)
            return replace(event, is_request_fault=True)
        if row.token_id is None:
            return self.finish(sequence, FinishReason.ERROR, now, error="the model's logits were not finite")
        sequence.token_ids.append(row.token_id)
        is_first = sequence.first_token is None
        if is_first:
            sequence.first_token = now
        reason = sequence.finish_reason(self.max_model_len, self.eos_token_ids)
        if reason is None:
            timings = sequence.timings(now) if is_first else None
            event = TokenEvent(sequence.request_id, [row.token_id], sequence.num_cached_tokens, timings=timings)
        else:
            stop_token_id = sequence.stop_token_id(self.eos_token_ids) if reason is FinishReason.STOP else None
            event = self.finish(sequence, reason, now, token_ids=[row.token_id], stop_token_id=stop_token_id)
        if row.logprob is not None:
            event = replace(event, logprobs=[row.logprob])
        if is_first and sequence.sampling.num_prompt_logprobs is not None:
            event = replace(event, prompt_logprobs=sequence.prompt_logprobs)
        return event

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        token_ids: list[int] | None = None,
        stop_token_id: int | None = None,
        error: str | None = None,
    ) -> TokenEvent:
        """Ends a sequence, wherever it is, and frees its blocks: the one path for every reason. Returns its last event."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.block_manager.free(sequence)
        return TokenEvent(
            sequence.request_id,
            token_ids or [],
            sequence.num_cached_tokens,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            error=error,
            timings=sequence.timings(now),
        )

    def expire(self, now: float) -> list[TokenEvent]:
        """Ends every sequence whose deadline has passed."""
        late = [
            sequence
            for sequence in (*self.running, *self.waiting)
            if sequence.request.deadline is not None and sequence.request.deadline <= now
        ]
        return [self.finish(sequence, FinishReason.TIMEOUT, now) for sequence in late]

    def stats(
        self, batch: ScheduledBatch | None, num_prompt_tokens: int, num_generation_tokens: int, step_seconds: float
    ) -> StepStats:
        """The state now; the admission counts are those of `batch`."""
        counts = self.block_manager.counts
        return StepStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_blocks=counts.total,
            num_used_blocks=counts.used,
            num_cached_blocks=counts.cached,
            num_prompt_tokens=num_prompt_tokens,
            num_generation_tokens=num_generation_tokens,
            num_prefix_queries=batch.num_prefix_queries if batch else 0,
            num_prefix_hits=batch.num_prefix_hits if batch else 0,
            num_preemptions=batch.num_preemptions if batch else 0,
            step_seconds=step_seconds,
        )
