"""Which sequences compute which tokens in the next step, and what follows from the tokens sampled.

One budget per step is shared by decodes (first), prefill chunks of running sequences, and newly admitted ones, in the order of
their ranks, or of their clients' turns: a number of tokens and, so that a long prompt does not stall everybody's next token, a
cost that stands for time.

Admission is optimistic: a sequence needs blocks for the tokens it has, not for those it may generate. When a running sequence
finds no block, the running one of the last rank is preempted: its blocks are freed and it is computed anew later, the prefix cache
permitting with little work. A sequence alone always fits: the pool holds max_model_len tokens at least.
"""

from __future__ import annotations

import itertools
import math
from bisect import insort
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

from server.engine.block_manager import BlockManager
from server.engine.drafts import DraftCounts, Drafter, Drafting
from server.engine.sequence import Sequence, SequenceStatus
from server.engine.step import ScheduledBatch, ScheduledSequence, Step, StepBudget
from server.engine.turns import Turns
from server.types import FinishReason, StepStats, TokenEvent, TokenLogprob


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the runner gives back for one row: a token, or None where the logits were not finite."""

    token_id: int | None
    logprob: TokenLogprob | None = None
    error: str | None = None  # where the request's own rules left nothing to choose


class Scheduler:
    """Two queues and a block manager. `schedule`, compute, `postprocess`; `add` and `finish` in between.

    Clients take turns, and of each who comes first goes first; with `priority_aging_seconds`, whoever has the lower priority
    less one level for every so many seconds since arrival. As all age alike, the order of two requests never changes: one of
    priority p is passed over only by requests of priority q < p that arrive less than (p - q) * `priority_aging_seconds` after
    it.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        budget: StepBudget,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        priority_aging_seconds: float | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        assert 0 < max_num_seqs <= budget.max_tokens
        assert block_manager.num_blocks * block_manager.block_size >= max_model_len
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.budget = budget
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.priority_aging_seconds = priority_aging_seconds
        self.drafting = drafting
        self._draft_counts = DraftCounts()
        self._arrivals = itertools.count()
        self._turns = Turns()
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []
        self._alone: list[Sequence] = []  # those added that are to share no step before their first token

    def add(self, sequence: Sequence) -> None:
        assert sequence.num_prompt_tokens + (sequence.pooling is None) <= self.max_model_len
        if self.priority_aging_seconds is None:
            place: float = self._turns.place(sequence.request.client, sequence.num_prompt_tokens)
        else:
            place = sequence.request.arrival_time + sequence.request.priority * self.priority_aging_seconds
        sequence.rank = place, next(self._arrivals)
        insort(self.waiting, sequence, key=lambda other: other.rank)
        if sequence.request.alone:
            self._alone.append(sequence)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # Before the step.
    def schedule(self, now: float) -> ScheduledBatch:
        self._draft_counts = DraftCounts()
        while self._alone and (self._alone[0].first_token or self._alone[0].status is SequenceStatus.FINISHED):
            del self._alone[0]
        if self._alone:
            return self._schedule_alone(self._alone[0], now)
        step = Step(self.budget, self.max_num_seqs + (self.drafting.max_rows if self.drafting else 0))
        decodes = [sequence for sequence in self.running if sequence.is_decoding]
        chunks = sorted((sequence for sequence in self.running if not sequence.is_decoding), key=self._place)
        # Within each, the order of admission or of places. Drafts come once every decode has its block.
        num_preemptions = self._add_running(step, decodes)
        self._add_drafts(step)
        queries = hits = 0
        for chunk in (*chunks, None):
            before = math.inf if chunk is None else self._place(chunk)
            while not num_preemptions and not step.is_full:
                admitted = self._admit(now, before)
                if admitted is None:
                    break
                queries += admitted.num_tokens
                hits += admitted.num_computed_tokens
                step.add(admitted)
                self._note_place(admitted)
            if chunk is not None and not step.is_full:
                self._note_place(chunk)
                num_preemptions += self._add_running(step, [chunk])
        return ScheduledBatch(step.entries, queries, hits, num_preemptions)

    def _place(self, sequence: Sequence) -> float:
        """Where the sequence's next chunk is in turn. With priorities no prompt is begun before another's rest."""
        if self.priority_aging_seconds is not None:
            return -math.inf
        return sequence.rank[0] + min(sequence.num_computed_tokens, sequence.num_prompt_tokens)

    def _note_place(self, sequence: Sequence) -> None:
        if self.priority_aging_seconds is None:
            self._turns.serve(int(self._place(sequence)))

    def _add_running(self, step: Step, sequences: Rows[Sequence]) -> int:
        """Adds what fits, preempting those of the last rank where blocks are missing. Returns how many were."""
        num_preemptions = 0
        for sequence in sequences:
            if step.is_full:
                break
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted by an earlier one
            while not self.block_manager.can_extend(sequence):
                victim = self._preempt_last()
                step.remove(victim)
                num_preemptions += 1
                if victim is sequence:
                    break
            if sequence.status is SequenceStatus.RUNNING:
                self.block_manager.extend(sequence)
                step.add(sequence)
        return num_preemptions

    def _add_drafts(self, step: Step) -> None:
        """To the decodes of a step. Nobody is preempted for a draft, or waits for the block that it takes."""
        if self.drafting is None:
            return
        least_chance = self.drafting.step_time.marginal_share(len(step.entries))
        room = step.room_for_drafts(self.drafting.max_rows)
        for index, entry in enumerate(step.entries):
            sequence = entry.sequence
            if sequence.drafter is None:
                sequence.drafter = Drafter(self.drafting.ngrams)
            # The step gives one token more than the drafts it accepts.
            limit = min(room, sequence.num_tokens_left(self.max_model_len) - 1, self._num_draft_slots(sequence))
            if limit <= 0:
                continue
            drafts = sequence.drafter.propose(sequence.token_ids, limit, least_chance)
            if drafts and sequence.matcher is not None:
                drafts = drafts[: sequence.matcher.num_valid(drafts)]
            if drafts:
                self.block_manager.extend(sequence, len(drafts))
                step.add_drafts(index, drafts)
                room -= len(drafts)

    def _num_draft_slots(self, sequence: Sequence) -> int:
        spare = self.block_manager.num_spare_slots(sequence)
        return spare if self.waiting else spare + self.block_manager.num_available * self.block_manager.block_size

    def _admit(self, now: float, before: float) -> Sequence | None:
        """Moves the first waiting sequence to running, if its place is before that one, and a seat and blocks are there. A
        sibling whose leader is still filling their common blocks is stepped over, and keeps its place."""
        if len(self.running) >= self.max_num_seqs:
            return None
        for index, sequence in enumerate(self.waiting):
            if sequence.rank[0] >= before:
                return None
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
        """Appends the sampled tokens, counts what was computed, publishes full blocks and ends what is done.

        `sampled` has one entry per row of `batch.rows`. Sequences that ended while the step ran are passed over.
        """
        events: list[TokenEvent] = []
        first = 0
        for entry in batch.entries:
            sequence = entry.sequence
            rows = sampled[first : first + 1 + len(entry.drafts)] if entry.samples else []
            first += len(rows)
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            if rows:
                events.append(self._advance(entry, rows, now))
                continue
            sequence.num_computed_tokens = entry.start + entry.num_new_tokens
            self.block_manager.publish(sequence, entry.start)
            if entry.is_last_chunk:
                events.append(self._finish_pooled(sequence, now))
        return events

    def _finish_pooled(self, sequence: Sequence, now: float) -> TokenEvent:
        """The whole prompt of a sequence to embed is computed."""
        assert sequence.pooled is not None
        embedding = sequence.pooled.embedding()
        if embedding is None:
            return self._finish_non_finite(sequence, "the model's hidden states were not finite", now)
        return replace(self.finish(sequence, FinishReason.STOP, now), embedding=embedding)

    def _advance(self, entry: ScheduledSequence, rows: Rows[SampledToken], now: float) -> TokenEvent:
        """Appends the first row's token, and further rows' as long as the drafts before them were right and nothing has
        ended the sequence."""
        sequence = entry.sequence
        taken: list[SampledToken] = []
        error: str | None = None
        reason: FinishReason | None = None
        for row, draft in zip(rows, (*entry.drafts, None), strict=True):
            error = self._error_of(sequence, row)
            if error is not None or row.token_id is None:
                break
            sequence.token_ids.append(row.token_id)
            taken.append(row)
            reason = sequence.finish_reason(self.max_model_len, self.eos_token_ids)
            if reason is not None or row.token_id != draft:
                break
        # The last token taken is still to be computed, or is again where a draft was right and its row of no use.
        sequence.num_computed_tokens = entry.start + entry.num_new_tokens - len(entry.drafts) + max(len(taken) - 1, 0)
        self.block_manager.publish(sequence, entry.start)
        if entry.drafts:
            self._count_drafts(entry, taken)
        if taken:
            return self._tell(sequence, taken, reason, now)
        if error is None:
            return self._finish_non_finite(sequence, "the model's logits were not finite", now)
        return replace(self.finish(sequence, FinishReason.ERROR, now, error=error), is_request_fault=True)

    @staticmethod
    def _error_of(sequence: Sequence, row: SampledToken) -> str | None:
        """What the request itself brought about. Moves its grammar on."""
        if row.error is not None or row.token_id is None or sequence.matcher is None:
            return row.error
        return None if sequence.matcher.accept(row.token_id) else sequence.matcher.error

    def _count_drafts(self, entry: ScheduledSequence, taken: Rows[SampledToken]) -> None:
        sequence = entry.sequence
        num_accepted = sum(row.token_id == draft for row, draft in zip(taken, entry.drafts, strict=False))
        self._draft_counts.add(len(entry.drafts), num_accepted)
        if sequence.drafter is not None:
            sequence.drafter.learn(len(entry.drafts), num_accepted)
        self.block_manager.trim(sequence)

    def _tell(
        self, sequence: Sequence, taken: Rows[SampledToken], reason: FinishReason | None, now: float
    ) -> TokenEvent:
        """The event of tokens that were appended, with `reason` where the last one ends the sequence."""
        token_ids = [row.token_id for row in taken if row.token_id is not None]
        is_first = sequence.first_token is None
        if is_first:
            sequence.first_token = now
        if reason is None:
            timings = sequence.timings(now) if is_first else None
            event = TokenEvent(sequence.request_id, token_ids, sequence.num_cached_tokens, timings=timings)
        else:
            stop_token_id = sequence.stop_token_id(self.eos_token_ids) if reason is FinishReason.STOP else None
            event = self.finish(sequence, reason, now, token_ids=token_ids, stop_token_id=stop_token_id)
        logprobs = [row.logprob for row in taken if row.logprob is not None]
        if logprobs:
            event = replace(event, logprobs=logprobs)
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
        self._close_gap(sequence)
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

    def _close_gap(self, sequence: Sequence) -> None:
        """What a prompt that is given up has not had is its client's again: its requests behind that one move up."""
        left = sequence.num_prompt_tokens - sequence.num_computed_tokens
        if self.priority_aging_seconds is not None or left <= 0:
            return
        client = sequence.request.client
        self._turns.give_back(client, left)
        for other in (*self.running, *self.waiting):
            if other.request.client == client and other.rank > sequence.rank:
                other.rank = other.rank[0] - left, other.rank[1]
        self.waiting.sort(key=lambda other: other.rank)

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
        drafts = self._draft_counts if batch else DraftCounts()
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
            num_drafts=drafts.num_drafts,
            num_draft_tokens=drafts.num_tokens,
            num_accepted_per_position=drafts.accepted_per_position,
        )
