"""Which sequences compute which tokens in the next step, and what follows from the tokens sampled.

One budget per step is shared by decodes (first), prefill chunks of running sequences, and newly admitted ones, in the order of
their ranks: a number of tokens and, so that a long prompt does not stall everybody's next token, a cost that stands for time.

Admission is optimistic: a sequence needs blocks for the tokens it has, not for those it may generate. When a running sequence
finds no block, the running one of the last rank is preempted: its blocks are freed and it is computed anew later, the prefix cache
permitting with little work. A sequence alone always fits: the pool holds max_model_len tokens at least.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

from server.engine.block_manager import BlockManager
from server.engine.sequence import Sequence, SequenceStatus
from server.engine.step import ScheduledBatch, Step, StepBudget
from server.types import FinishReason, StepStats, TokenEvent, TokenLogprob


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the runner gives back for one row: a token, or None where the logits were not finite."""

    token_id: int | None
    logprob: TokenLogprob | None = None
    error: str | None = None  # where the request's own rules left nothing to choose


class Scheduler:
    """Two queues and a block manager. `schedule`, compute, `postprocess`; `add` and `finish` in between.

    Who comes first goes first; with `priority_aging_seconds`, whoever has the lower priority less one level for every so many
    seconds since arrival. As all age alike, the order of two requests never changes: one of priority p is passed over only
    by requests of priority q < p that arrive less than (p - q) * `priority_aging_seconds` after it.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        budget: StepBudget,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        priority_aging_seconds: float | None = None,
    ) -> None:
        assert 0 < max_num_seqs <= budget.max_tokens
        assert block_manager.num_blocks * block_manager.block_size >= max_model_len
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.budget = budget
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.priority_aging_seconds = priority_aging_seconds
        self._arrivals = itertools.count()
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []
        self._alone: list[Sequence] = []  # those added that are to share no step before their first token

    def add(self, sequence: Sequence) -> None:
        assert sequence.num_prompt_tokens + (sequence.pooling is None) <= self.max_model_len
        time = 0.0
        if self.priority_aging_seconds is not None:
            time = sequence.request.arrival_time + sequence.request.priority * self.priority_aging_seconds
        sequence.rank = time, next(self._arrivals)
        insort(self.waiting, sequence, key=lambda other: other.rank)
        if sequence.request.alone:
            self._alone.append(sequence)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # Before the step.
    def schedule(self, now: float) -> ScheduledBatch:
        while self._alone and (self._alone[0].first_token or self._alone[0].status is SequenceStatus.FINISHED):
            del self._alone[0]
        if self._alone:
            return self._schedule_alone(self._alone[0], now)
        step = Step(self.budget, self.max_num_seqs)
        num_preemptions = 0
        # Decodes before chunks; within each, the order of admission. Preemption takes the one of the last rank.
        for sequence in sorted(self.running, key=lambda s: not s.is_decoding):
            if step.is_full:
                break
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted by an earlier one in this very loop
            while not self.block_manager.can_extend(sequence):
                victim = self._preempt_last()
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
            prefix = [] if sequence.needs_every_position else self.block_manager.find_prefix(sequence)
            if not self.block_manager.can_allocate(sequence, prefix):
                return None
            del self.waiting[index]
            self._seat(sequence, prefix, now)
            return sequence
        return None

    def _seat(self, sequence: Sequence, prefix: list[int], now: float) -> None:
        """Gives one that waited its blocks, the cached `prefix` among them."""
        self.block_manager.allocate(sequence, prefix)
        if sequence.first_scheduled is None:
            sequence.first_scheduled = now
            sequence.num_cached_tokens = sequence.num_computed_tokens
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)

    def _schedule_alone(self, sequence: Sequence, now: float) -> ScheduledBatch:
        """A step of this one only; whoever stands in its way is preempted."""
        num_preemptions = queries = hits = 0
        if sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
            while True:
                prefix = [] if sequence.needs_every_position else self.block_manager.find_prefix(sequence)
                if len(self.running) < self.max_num_seqs and self.block_manager.can_allocate(sequence, prefix):
                    break
                self._preempt_last()
                num_preemptions += 1
            self._seat(sequence, prefix, now)
            queries, hits = sequence.num_tokens, sequence.num_computed_tokens
        step = Step(self.budget, self.max_num_seqs)
        step.add(sequence)
        return ScheduledBatch(step.entries, queries, hits, num_preemptions)

    def _waits_for_sibling(self, sequence: Sequence) -> bool:
        group, size = sequence.group_id, self.block_manager.block_size
        shared = (sequence.num_prompt_tokens - 1) // size * size
        if not group or not shared or not self.block_manager.enable_prefix_caching:
            return False
        return any(other.group_id == group and other.num_computed_tokens < shared for other in self.running)

    def _preempt_last(self) -> Sequence:
        victim = max(self.running, key=lambda sequence: sequence.rank)
        self.running.remove(victim)
        self.block_manager.free(victim)
        victim.status = SequenceStatus.WAITING
        victim.num_preemptions += 1
        insort(self.waiting, victim, key=lambda other: other.rank)
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
            row = next(rows) if entry.samples else None
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            sequence.num_computed_tokens = entry.start + entry.num_new_tokens
            self.block_manager.publish(sequence, entry.start)
            if row is not None:
                events.append(self._append(sequence, row, now))
            elif entry.is_last_chunk:
                events.append(self._finish_pooled(sequence, now))
        return events

    def _finish_pooled(self, sequence: Sequence, now: float) -> TokenEvent:
        """The whole prompt of a sequence to embed is computed."""
        assert sequence.pooled is not None
        embedding = sequence.pooled.embedding()
        if embedding is None:
            return self._finish_non_finite(sequence, "the model's hidden states were not finite", now)
        return replace(self.finish(sequence, FinishReason.STOP, now), embedding=embedding)

    def _append(self, sequence: Sequence, row: SampledToken, now: float) -> TokenEvent:
        error = row.error
        if error is None and row.token_id is not None and sequence.matcher is not None:
            error = None if sequence.matcher.accept(row.token_id) else sequence.matcher.error
        if error is not None:
            event = self.finish(sequence, FinishReason.ERROR, now, error=error)
            return replace(event, is_request_fault=True)
        if row.token_id is None:
            return self._finish_non_finite(sequence, "the model's logits were not finite", now)
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

    def _finish_non_finite(self, sequence: Sequence, error: str, now: float) -> TokenEvent:
        """What it computed may be what is not finite: nobody else is to find it in the prefix cache."""
        self.block_manager.forget(sequence)
        return replace(self.finish(sequence, FinishReason.ERROR, now, error=error), is_non_finite=True)

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
