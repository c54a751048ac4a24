"""Runs a model over scheduled batches: owns the buffers, the KV pool and the recorded forward pass."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import Backend, KVCacheSpec, SampledRows
from server.engine.batch import fill_forward_batch
from server.engine.drafts import StepTime
from server.engine.logits import Scores
from server.engine.pooling import pool_states
from server.engine.sampler import Sampler
from server.engine.scheduler import SampledToken
from server.engine.sequence import Sequence
from server.engine.step import ScheduledBatch, ScheduledSequence
from server.models.decoder import Decoder

WARM_UP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A launched step. `scores` and `errors` are by row; `prompt_scores` tells of a position what it says of the next token."""

    sampled: SampledRows | None
    scores: dict[int, Scores]
    errors: dict[int, str]
    prompt_scores: list[tuple[Sequence, int, Scores]]


class Runner:
    """`launch` starts a step, `collect` waits for its tokens; apart, so that scheduling can overlap with computing."""

    def __init__(
        self,
        decoder: Decoder,
        backend: Backend,
        kv_spec: KVCacheSpec,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        max_draft_rows: int = 0,
    ) -> None:
        self.decoder = decoder
        self.backend = backend
        self.block_size = kv_spec.block_size
        self.vocab_size = decoder.config.vocab_size
        max_blocks = -(-max_model_len // kv_spec.block_size)
        self.batch, sampling = backend.allocate_batches(
            max_num_batched_tokens, max_num_seqs, max_blocks, max_num_seqs + max_draft_rows
        )
        self.kv = backend.allocate_kv(kv_spec)
        self.sampler = Sampler(backend, sampling, eos_token_ids)
        self.program = backend.record(lambda: decoder.forward(self.batch, self.kv), self.batch)

    @torch.inference_mode()
    def warm_up(self) -> tuple[float, int, StepTime]:
        """Runs small batches, so that the first request finds everything compiled and paged in. Returns the seconds that the last
        of them took, its number of tokens, and what a step takes by them. They write to the first blocks, which nothing refers
        to yet."""
        length = min(self.batch.max_tokens, WARM_UP_TOKENS, self.batch.block_tables.shape[1] * self.block_size)
        self._time(length)
        one, many = min(self._time(1), self._time(1)), self._time(length)
        per_row = max(many - one, 0.0) / max(length - 1, 1)
        return many, length, StepTime(max(one - per_row, 0.0), max(per_row, 1e-9))

    def _time(self, length: int) -> float:
        tokens, blocks = range(length), range(-(-length // self.block_size))
        self.batch.fill([0] * length, tokens, tokens, [length], [length], [blocks], [length - 1])
        sampling = self.sampler.fill([])
        started = time.perf_counter()
        self.backend.sample(self.program.run()[:1], sampling).to_host()  # which waits
        return time.perf_counter() - started

    @torch.inference_mode()
    def launch(self, scheduled: ScheduledBatch) -> StepHandle:
        self._pool(scheduled.only(pooling=True))
        entries = scheduled.only(pooling=False)
        if not entries:
            return StepHandle(None, {}, {}, [])
        fill_forward_batch(self.batch, entries, self.block_size)
        rows = scheduled.rows
        sampling = self.sampler.fill(rows)
        logits: Tensor = self.program.run()
        prompt_scores = self._score_prompts(scheduled, logits[len(rows) :])
        if not rows:
            return StepHandle(None, {}, {}, prompt_scores)
        logits = logits[: len(rows)]
        scores = {
            index: Scores(logits[index], row.sequence.sampling.num_logprobs)
            for index, row in enumerate(rows)
            if row.sequence.sampling.num_logprobs is not None
        }
        errors = self.sampler.apply_rules(rows, logits)
        return StepHandle(self.backend.sample(logits, sampling), scores, errors, prompt_scores)

    def _pool(self, entries: list[ScheduledSequence]) -> None:
        """A pass of its own for prompts that are embedded: it ends in hidden states of every token, and in no logits. Waits for
        them, as the buffers are wanted again for the rest of the step."""
        if entries:
            fill_forward_batch(self.batch, entries, self.block_size)
            states = self.backend.run_once(lambda: self.decoder.forward(self.batch, self.kv, to_logits=False))
            pool_states(entries, states.float().cpu())

    def _score_prompts(self, scheduled: ScheduledBatch, logits: Tensor) -> list[tuple[Sequence, int, Scores]]:
        scored = [(entry.sequence, position) for entry in scheduled.entries for position in entry.scored]
        return [
            (sequence, position, Scores(logits[row], sequence.sampling.num_prompt_logprobs or 0))
            for row, (sequence, position) in enumerate(scored)
        ]

    def collect(self, handle: StepHandle) -> list[SampledToken]:
        """One entry per row of the step. Scored prompts get what was found out about them."""
        for sequence, position, scores in handle.prompt_scores:
            sequence.prompt_logprobs.append(scores.of(sequence.token_ids[position + 1]))
        if handle.sampled is None:
            return []
        token_ids, finite = handle.sampled.to_host()
        return [
            SampledToken(
                token if ok else None,
                handle.scores[row].of(token) if ok and row in handle.scores else None,
                handle.errors.get(row),
            )
            for row, (token, ok) in enumerate(zip(token_ids, finite, strict=True))
        ]
