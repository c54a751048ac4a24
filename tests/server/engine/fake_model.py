"""An engine around a model made of arithmetic: its "keys" are digests of (token, position), and the token it samples is a digest
of exactly the keys that the batch's block tables and lengths point at. A wrong slot, length, block or cached prefix changes the
output, so comparing with `expected_output` checks scheduler, block manager and batch together, without weights."""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_right
from collections.abc import Callable

import torch

from kernels.batch import ForwardBatch
from server.engine.batch import fill_forward_batch
from server.engine.block_manager import BlockManager
from server.engine.drafts import Drafting
from server.engine.engine import Engine
from server.engine.scheduler import SampledToken, Scheduler
from server.engine.step import ScheduledBatch, StepBudget
from server.types import EngineInfo, FinishReason, GenerateRequest, SamplingParams, TokenEvent

VOCABULARY = 997


def key_of(token: int, position: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{token}:{position}".encode()).digest()[:6], "big")


def sample(keys: list[int], vocabulary: int = VOCABULARY) -> int:
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:6], "big") % vocabulary


def expected_output(prompt: list[int], max_tokens: int, vocabulary: int = VOCABULARY) -> list[int]:
    """What the model answers, computed from the tokens alone."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(sample([key_of(token, position) for position, token in enumerate(tokens)], vocabulary))
    return tokens[len(prompt) :]


class FakeRunner:
    """Reads and writes a pool of keys through the real `ForwardBatch`."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        max_draft_rows: int = 0,
        vocabulary: int = VOCABULARY,
    ) -> None:
        self.block_size = block_size
        self.vocabulary = vocabulary
        self.keys = [-1] * (num_blocks * block_size)
        max_blocks = -(-max_model_len // block_size)
        max_rows = max_num_seqs + max_draft_rows
        self.batch = ForwardBatch.allocate(max_tokens, max_num_seqs, max_blocks, max_rows, torch.device("cpu"))
        self.largest_batch = 0

    def launch(self, scheduled: ScheduledBatch) -> list[SampledToken]:
        batch = self.batch
        fill_forward_batch(batch, scheduled.entries, self.block_size)
        num_tokens, num_sequences, num_rows = batch.counts.tolist()
        self.largest_batch = max(self.largest_batch, num_tokens)
        for token in range(num_tokens):
            slot = int(batch.slot_mapping[token])
            self.keys[slot] = key_of(int(batch.input_ids[token]), int(batch.positions[token]))
        starts = batch.query_starts.tolist()[: num_sequences + 1]
        sampled = []
        for row in batch.logit_rows[:num_rows].tolist():
            sequence = bisect_right(starts, row) - 1
            table, size = batch.block_tables[sequence].tolist(), self.block_size
            # The row's own key is the last that it sees.
            length = int(batch.seq_lens[sequence]) - (starts[sequence + 1] - 1 - row)
            keys = [self.keys[table[position // size] * size + position % size] for position in range(length)]
            sampled.append(SampledToken(sample(keys, self.vocabulary)))
        return sampled

    def collect(self, handle: list[SampledToken]) -> list[SampledToken]:
        return handle


def make_engine(
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_batched_tokens: int = 32,
    max_num_seqs: int = 8,
    max_model_len: int = 64,
    enable_prefix_caching: bool = True,
    eos_token_ids: frozenset[int] = frozenset(),
    cost: dict[str, float] | None = None,
    priority_aging_seconds: float | None = None,
    drafting: Drafting | None = None,
    vocabulary: int = VOCABULARY,
) -> Engine:
    manager = BlockManager(num_blocks, block_size, enable_prefix_caching)
    scheduler = Scheduler(
        manager,
        max_num_seqs,
        StepBudget(max_num_batched_tokens, **(cost or {})),
        max_model_len,
        eos_token_ids,
        priority_aging_seconds,
        drafting,
    )
    runner = FakeRunner(
        num_blocks,
        block_size,
        max_num_batched_tokens,
        max_num_seqs,
        max_model_len,
        drafting.max_rows if drafting else 0,
        vocabulary,
    )
    info = EngineInfo(0, max_model_len, num_blocks, block_size, "fake")
    return Engine(scheduler, runner, info, seed=0)  # type: ignore[arg-type]


def request(
    request_id: str, prompt: list[int], max_tokens: int, group_id: str = "", **sampling: object
) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling)  # type: ignore[arg-type]
    return GenerateRequest(request_id, prompt, params, time.monotonic(), group_id=group_id)


def run_to_end(
    engine: Engine, on_step: Callable[[int], None] = lambda step: None, max_steps: int = 20_000
) -> dict[str, list[TokenEvent]]:
    """Steps until idle, checking the pool after every step. Returns each request's events."""
    events: dict[str, list[TokenEvent]] = {}
    step = 0
    on_step(step)
    while engine.has_work():
        assert step < max_steps, "the engine makes no progress"
        output = engine.step()
        engine.scheduler.block_manager.check()
        stats = output.stats
        assert stats.num_used_blocks + stats.num_cached_blocks <= stats.num_blocks
        for sequence in engine.scheduler.running:  # drafts hold no block beyond their step
            assert len(sequence.block_table) <= engine.scheduler.block_manager.blocks_for(sequence.num_tokens)
        for event in output.events:
            events.setdefault(event.request_id, []).append(event)
        step += 1
        on_step(step)
    counts = engine.scheduler.block_manager.counts
    assert counts.used == 0, f"blocks leaked: {counts}"
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def reason_of(events: list[TokenEvent]) -> FinishReason:
    reasons = [event.finish_reason for event in events if event.finish_reason is not None]
    assert len(reasons) == 1 and events[-1].finish_reason is not None, (
        "a request ends exactly once, with its last event"
    )
    return reasons[0]
