"""Which sequences compute which tokens in the next step, and what follows from the tokens sampled.

One token budget per step is shared by decodes (first), prefill chunks of running sequences, and newly admitted ones, first come
first served. Admission is optimistic: a sequence needs blocks for the tokens it has, not for those it may generate. When a running
sequence finds no block, the youngest running one is preempted: its blocks are freed and it is computed anew later, the prefix
cache permitting with little work. A sequence alone always fits: the pool holds max_model_len tokens at least.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Rows
from dataclasses import dataclass

from server.engine.block_manager import BlockManager
from server.engine.sequence import Sequence, SequenceStatus
from server.types import FinishReason, StepStats, TokenEvent


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


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """A step. Rows of logits belong to `sampling`, in that order."""

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


class Scheduler:
    """Two queues and a block manager. `schedule`, compute, `postprocess`; `add` and `finish` in between."""

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        assert 0 < max_num_seqs <= max_num_batched_tokens
        assert block_manager.num_blocks * block_manager.block_size >= max_model_len
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
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
        budget = self.max_num_batched_tokens
        entries: list[ScheduledSequence] = []
        num_preemptions = 0
        # Decodes before chunks; within each, the order of admission. Preemption takes from the end of `running`.
        for sequence in sorted(self.running, key=lambda s: not s.is_decoding):
            if not budget:
                break
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted by an earlier one in this very loop
            while not self.block_manager.can_extend(sequence):
                victim = self._preempt_youngest()
                entries = [entry for entry in entries if entry.sequence is not victim]
                num_preemptions += 1
                if victim is sequence:
                    break
            if sequence.status is SequenceStatus.RUNNING:
                self.block_manager.extend(sequence)
                entries.append(self._take(sequence, budget))
                budget = self.max_num_batched_tokens - sum(entry.num_new_tokens for entry in entries)
        queries = hits = 0
        if not num_preemptions:
            for sequence in self._admit(budget, now):
                queries += sequence.num_tokens
                hits += sequence.num_computed_tokens
                entries.append(self._take(sequence, budget))
                budget -= entries[-1].num_new_tokens
        return ScheduledBatch(entries, queries, hits, num_preemptions)

    def _take(self, sequence: Sequence, budget: int) -> ScheduledSequence:
        num_new_tokens = min(sequence.num_uncomputed_tokens, budget)
        return ScheduledSequence(sequence, sequence.num_computed_tokens, num_new_tokens)

    def _admit(self, budget: int, now: float) -> list[Sequence]:
        """Moves waiting sequences to running, in order, while seats, tokens and blocks last. A sibling whose leader is still
        filling their common blocks is stepped over, and keeps its place."""
        admitted: list[Sequence] = []
        held: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if self._waits_for_sibling(sequence):
                held.append(self.waiting.popleft())
                continue
            prefix = self.block_manager.find_prefix(sequence)
            if not self.block_manager.can_allocate(sequence, prefix):
                break
            self.waiting.popleft()
            self.block_manager.allocate(sequence, prefix)
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
                sequence.num_cached_tokens = sequence.num_computed_tokens
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            admitted.append(sequence)
            budget -= min(budget, sequence.num_uncomputed_tokens)
        self.waiting.extendleft(reversed(held))
        return admitted

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
        if row.token_id is None:
            return self.finish(sequence, FinishReason.ERROR, now, error="the model's logits were not finite")
        sequence.token_ids.append(row.token_id)
        if sequence.first_token is None:
            sequence.first_token = now
        reason = sequence.finish_reason(self.max_model_len, self.eos_token_ids)
        if reason is None:
            return TokenEvent(sequence.request_id, [row.token_id], sequence.num_cached_tokens)
        stop_token_id = row.token_id if reason is FinishReason.STOP else None
        return self.finish(sequence, reason, now, token_ids=[row.token_id], stop_token_id=stop_token_id)

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
