"""Laws of the engine under random schedules: no output depends on the load, no block is lost, every request ends once.
And the laws' own test: planted bugs must break them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.batch import ForwardBatch
from server.engine import block_manager as block_manager_module
from server.engine.block_manager import BlockManager
from server.types import AbortReason, FinishReason
from tests.server.engine.fake_model import expected_output, make_engine, reason_of, request, run_to_end, tokens_of


@dataclass(frozen=True)
class Arrival:
    step: int
    prefix: int  # which of three shared texts the prompt begins with
    prefix_length: int
    tail: tuple[int, ...]
    max_tokens: int
    abort_after: int | None
    siblings: int

    @property
    def prompt(self) -> list[int]:
        shared = [(self.prefix * 31 + position * 7) % 997 for position in range(self.prefix_length)]
        return [*shared, *self.tail]


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 30),
        prefix=st.integers(0, 2),
        prefix_length=st.integers(0, 24),
        tail=st.lists(st.integers(0, 996), min_size=1, max_size=12).map(tuple),
        max_tokens=st.integers(1, 16),
        abort_after=st.one_of(st.none(), st.none(), st.integers(0, 20)),
        siblings=st.sampled_from((1, 1, 1, 3)),
    ),
    min_size=1,
    max_size=12,
)
ENGINES = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(16, 40),
        "max_num_seqs": st.integers(1, 8),
        "max_num_batched_tokens": st.integers(8, 40),
        "enable_prefix_caching": st.booleans(),
        "cost": st.sampled_from((None, {"max_cost": 9.0}, {"max_cost": 20.0, "balanced_context": 10.0})),
    }
)


def check_laws(arrivals: list[Arrival], engine_options: dict[str, Any]) -> None:
    engine = make_engine(block_size=4, max_model_len=64, **engine_options)
    plans = {
        f"{index}.{sibling}": arrival for index, arrival in enumerate(arrivals) for sibling in range(arrival.siblings)
    }
    waiting = dict(plans)

    def on_step(step: int) -> None:
        # An idle engine would end the run: what is left arrives at once.
        for request_id, arrival in list(waiting.items()):
            if arrival.step <= step or not engine.has_work():
                del waiting[request_id]
                group = request_id.split(".")[0] if arrival.siblings > 1 else ""
                engine.submit(request(request_id, arrival.prompt, arrival.max_tokens, group))
        for request_id, arrival in plans.items():
            if (
                request_id not in waiting
                and arrival.abort_after is not None
                and step >= arrival.step + arrival.abort_after
            ):
                engine.abort(request_id, AbortReason.CLIENT)

    events = run_to_end(engine, on_step)
    assert events.keys() == plans.keys()
    for request_id, arrival in plans.items():
        expected, got = expected_output(arrival.prompt, arrival.max_tokens), tokens_of(events[request_id])
        if reason_of(events[request_id]) is FinishReason.ABORT:
            assert arrival.abort_after is not None and got == expected[: len(got)]
        else:
            assert got == expected, request_id
            assert reason_of(events[request_id]) is FinishReason.LENGTH
    assert engine.runner.largest_batch <= engine_options["max_num_batched_tokens"]  # type: ignore[attr-defined]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ARRIVALS, ENGINES)
def test_output_is_independent_of_the_load_and_no_block_is_lost(
    arrivals: list[Arrival], engine_options: dict[str, int]
) -> None:
    check_laws(arrivals, engine_options)


CROWDED = [Arrival(step, step % 3, 16, (step + 1, 5, 7), 14, None, 1 + 2 * (step % 4 == 0)) for step in range(10)]
CROWDED_ENGINE = {"num_blocks": 16, "max_num_seqs": 6, "max_num_batched_tokens": 12, "enable_prefix_caching": True}


def test_the_crowded_schedule_preempts_and_hits_the_cache() -> None:
    """The planted bugs below are caught on a schedule that uses every mechanism."""
    check_laws(CROWDED, CROWDED_ENGINE)
    engine = make_engine(block_size=4, max_model_len=64, **CROWDED_ENGINE)
    for index, arrival in enumerate(CROWDED):
        engine.submit(request(str(index), arrival.prompt, arrival.max_tokens))
    preemptions = hits = 0
    while engine.has_work():
        stats = engine.step().stats
        preemptions += stats.num_preemptions
        hits += stats.num_prefix_hits
    assert preemptions > 0 and hits > 0


def plant_short_length(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = ForwardBatch.fill

    def planted(self, input_ids, positions, slots, query_lens, seq_lens, block_tables, logit_rows):  # type: ignore[no-untyped-def]
        fill(self, input_ids, positions, slots, query_lens, [n - 1 for n in seq_lens], block_tables, logit_rows)

    monkeypatch.setattr(ForwardBatch, "fill", planted)


def plant_early_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached prefix's blocks are handed out without a reference, so they can be freed or evicted under a reader."""
    monkeypatch.setattr(BlockManager, "_reference", lambda self, block: self._references.__setitem__(block, 1))


def plant_stale_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's hash ignores what came before it: equal blocks after different prefixes are mixed up."""
    original = block_manager_module.hash_block
    monkeypatch.setattr(block_manager_module, "hash_block", lambda parent, tokens, extra: original(b"", tokens, extra))


def plant_early_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's blocks become findable with its first chunk, before the later ones are filled."""
    publish = BlockManager.publish

    def planted(self, sequence, before):  # type: ignore[no-untyped-def]
        computed = sequence.num_computed_tokens
        sequence.num_computed_tokens = max(computed, sequence.num_prompt_tokens)
        publish(self, sequence, before)
        sequence.num_computed_tokens = computed

    monkeypatch.setattr(BlockManager, "publish", planted)


@pytest.mark.parametrize("plant", [plant_short_length, plant_early_free, plant_stale_hash, plant_early_publish])
def test_planted_bugs_break_the_laws(plant, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    # Blocks that are equal but follow different prefixes, for the stale hash; shared prefixes, for the rest.
    same_tail = [Arrival(step, step % 3, 4 * (step % 3 + 1), tuple(range(8)), 10, None, 1) for step in range(8)]
    # A prompt of several chunks whose first sender leaves after one of them, for blocks published before they are filled.
    long_prompts = [Arrival(step, 0, 24, tuple(range(12)), 4, 1 if step == 0 else None, 1) for step in range(2)]
    plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        check_laws(CROWDED, CROWDED_ENGINE)
        check_laws(same_tail, CROWDED_ENGINE)
        check_laws(long_prompts, CROWDED_ENGINE)
