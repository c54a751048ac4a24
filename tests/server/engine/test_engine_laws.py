"""Laws of the engine under random schedules: no output depends on the load, no block is lost, every request ends once.
And the laws' own test: planted bugs must break them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.batch import ForwardBatch
from server.config import NgramSpeculation
from server.engine import block_manager as block_manager_module
from server.engine.block_manager import BlockManager
from server.engine.drafts import Drafting, StepTime
from server.engine.scheduler import SampledToken, Scheduler
from server.types import AbortReason, FinishReason
from tests.server.engine.fake_model import (
    VOCABULARY,
    expected_output,
    make_engine,
    reason_of,
    request,
    run_to_end,
    tokens_of,
)


@dataclass(frozen=True)
class Arrival:
    step: int
    prefix: int  # which of three shared texts the prompt begins with
    prefix_length: int
    tail: tuple[int, ...]
    max_tokens: int
    abort_after: int | None
    siblings: int
    client: str = ""
    min_tokens: int | None = None  # where the output ends with the first token 0 from there on

    def output(self, vocabulary: int) -> list[int]:
        """All of it."""
        output = expected_output(self.prompt, self.max_tokens, vocabulary)
        if self.min_tokens is not None and 0 in output[max(self.min_tokens, 1) - 1 :]:
            output = output[: output.index(0, max(self.min_tokens, 1) - 1) + 1]
        return output

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
        client=st.sampled_from(("", "", "a", "b")),
        min_tokens=st.sampled_from((None, 0, 5)),
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
# Drafts always pay, or hardly ever; the model that knows three tokens alone makes texts that repeat, and many drafts right.
DRAFTINGS = st.builds(
    Drafting,
    st.sampled_from((NgramSpeculation(1), NgramSpeculation(4, 1, 3), NgramSpeculation(9, 1, 1))),
    st.sampled_from((StepTime(1e9, 1.0), StepTime(1.0, 1.0))),
    st.integers(1, 12),
)


def check_laws(arrivals: list[Arrival], engine_options: dict[str, Any]) -> None:
    vocabulary = engine_options.get("vocabulary", VOCABULARY)
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
                stop = {} if arrival.min_tokens is None else {"stop_token_ids": (0,), "min_tokens": arrival.min_tokens}
                submitted = request(request_id, arrival.prompt, arrival.max_tokens, group, **stop)
                engine.submit(replace(submitted, client=arrival.client))
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
        expected, got = arrival.output(vocabulary), tokens_of(events[request_id])
        if reason_of(events[request_id]) is FinishReason.ABORT:
            assert arrival.abort_after is not None and got == expected[: len(got)]
        else:
            assert got == expected, request_id
            stops = arrival.min_tokens is not None and expected[-1] == 0 and len(expected) >= arrival.min_tokens
            assert reason_of(events[request_id]) is (FinishReason.STOP if stops else FinishReason.LENGTH)
            assert events[request_id][-1].stop_token_id == (0 if stops else None)
    assert engine.runner.largest_batch <= engine_options["max_num_batched_tokens"]  # type: ignore[attr-defined]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ARRIVALS, ENGINES)
def test_output_is_independent_of_the_load_and_no_block_is_lost(
    arrivals: list[Arrival], engine_options: dict[str, int]
) -> None:
    check_laws(arrivals, engine_options)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ARRIVALS, ENGINES, DRAFTINGS)
def test_drafts_change_nothing_but_the_number_of_steps(
    arrivals: list[Arrival], engine_options: dict[str, Any], drafting: Drafting
) -> None:
    check_laws(arrivals, {**engine_options, "drafting": drafting, "vocabulary": 3})


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


DRAFTED_ENGINE = CROWDED_ENGINE | {
    "drafting": Drafting(NgramSpeculation(4, 1, 3), StepTime(1e9, 1.0), 8),
    "vocabulary": 3,
    "max_num_batched_tokens": 30,
}


def test_the_drafted_schedule_has_drafts_right_and_wrong() -> None:
    check_laws(CROWDED, DRAFTED_ENGINE)
    engine = make_engine(block_size=4, max_model_len=64, **DRAFTED_ENGINE)
    for index, arrival in enumerate(CROWDED):
        engine.submit(request(str(index), arrival.prompt, arrival.max_tokens))
    drafted = accepted = preemptions = 0
    while engine.has_work():
        stats = engine.step().stats
        drafted += stats.num_draft_tokens
        accepted += sum(stats.num_accepted_per_position)
        preemptions += stats.num_preemptions
    assert 5 < accepted < drafted - 5 and preemptions > 0


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


def plant_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are taken without a look at what was sampled."""
    advance = Scheduler._advance

    def planted(self, entry, rows, now):  # type: ignore[no-untyped-def]
        return advance(self, entry, [*(SampledToken(draft) for draft in entry.drafts), rows[-1]], now)

    monkeypatch.setattr(Scheduler, "_advance", planted)


def plant_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of a sequence with drafts are its last one."""
    fill = ForwardBatch.fill

    def planted(self, input_ids, positions, slots, query_lens, seq_lens, block_tables, logit_rows):  # type: ignore[no-untyped-def]
        ends = list(itertools.accumulate(query_lens))
        moved = [next(end - 1 for end in ends if row < end) for row in logit_rows]
        fill(self, input_ids, positions, slots, query_lens, seq_lens, block_tables, moved)

    monkeypatch.setattr(ForwardBatch, "fill", planted)


def plant_kept_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks taken for drafts stay with their sequence."""
    monkeypatch.setattr(BlockManager, "trim", lambda self, sequence: None)


@pytest.mark.parametrize("plant", [plant_trust, plant_wrong_rows, plant_kept_blocks])
def test_planted_bugs_of_drafts_break_the_laws(plant, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        check_laws(CROWDED, DRAFTED_ENGINE)


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
