"""What the scheduler promises, one behaviour a test."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from server.engine.step import MIN_CHUNK, StepBudget
from server.types import AbortReason, FinishReason
from tests.server.engine.fake_model import expected_output, make_engine, reason_of, request, run_to_end, tokens_of


def test_decodes_go_before_prefill_chunks_within_one_budget() -> None:
    engine = make_engine(max_num_batched_tokens=8)
    engine.submit(request("short", [1, 2], 20))
    engine.step()
    engine.submit(request("long", list(range(40)), 4))
    batch = engine.scheduler.schedule(time.monotonic())
    assert [(entry.sequence.request_id, entry.num_new_tokens) for entry in batch.entries] == [("short", 1), ("long", 7)]


def test_a_step_costs_less_the_longer_the_context_is() -> None:
    """With attention over 100 keys as dear as the linears, chunks shrink as the prompt goes on, and never below MIN_CHUNK."""
    budget = StepBudget(512, max_cost=100.0, balanced_context=100.0)
    for start in (0, 50, 100, 400):
        tokens = budget.affordable(start, 100.0)
        assert budget.cost(start, tokens) <= 100.0 < budget.cost(start, tokens + 1)
    assert budget.affordable(10_000, 100.0) == MIN_CHUNK and budget.affordable(0, -5.0) == MIN_CHUNK
    engine = make_engine(
        max_num_batched_tokens=64, max_model_len=128, cost={"max_cost": 40.0, "balanced_context": 30.0}
    )
    engine.submit(request("long", list(range(100)), 2))
    chunks = []
    while engine.has_work():
        batch = engine.scheduler.schedule(time.monotonic())
        chunks.append(batch.num_tokens)
        engine.scheduler.postprocess(batch, engine.runner.collect(engine.runner.launch(batch)), time.monotonic())
    assert chunks[0] > chunks[1] >= MIN_CHUNK and sum(chunks) == 101


def test_a_decode_is_not_delayed_by_a_long_prompt() -> None:
    engine = make_engine(max_num_batched_tokens=8)
    engine.submit(request("short", [1, 2], 12))
    engine.step()
    engine.submit(request("long", list(range(50)), 2))
    for _ in range(5):
        assert [event.request_id for event in engine.step().events] == ["short"]


@pytest.mark.parametrize(
    ("sampling", "reason", "length"),
    [
        ({}, FinishReason.LENGTH, 6),
        ({"stop_token_ids": "third"}, FinishReason.STOP, 3),
        ({"stop_token_ids": "third", "min_tokens": 4}, FinishReason.LENGTH, 6),
    ],
)
def test_finish_reasons(sampling: dict, reason: FinishReason, length: int) -> None:
    output = expected_output([5, 6, 7], 6)
    if sampling.get("stop_token_ids") == "third":
        sampling = {**sampling, "stop_token_ids": (output[2],)}
    engine = make_engine()
    engine.submit(request("a", [5, 6, 7], 6, **sampling))
    events = run_to_end(engine)["a"]
    assert reason_of(events) is reason and tokens_of(events) == output[:length]
    assert events[-1].stop_token_id == (output[2] if reason is FinishReason.STOP else None)


def test_end_of_sequence_and_ignoring_it() -> None:
    output = expected_output([5, 6, 7], 6)
    engine = make_engine(eos_token_ids=frozenset({output[1]}))
    engine.submit(request("stops", [5, 6, 7], 6))
    engine.submit(request("goes on", [5, 6, 7], 6, ignore_eos=True))
    events = run_to_end(engine)
    assert tokens_of(events["stops"]) == output[:2] and reason_of(events["stops"]) is FinishReason.STOP
    assert tokens_of(events["goes on"]) == output


def test_the_context_ends_a_sequence() -> None:
    engine = make_engine(max_model_len=16)
    engine.submit(request("a", list(range(10)), 100))
    events = run_to_end(engine)["a"]
    assert len(tokens_of(events)) == 6 and reason_of(events) is FinishReason.LENGTH


def test_a_repeated_prompt_computes_its_last_token_only() -> None:
    engine = make_engine(block_size=4)
    prompt = list(range(16))
    engine.submit(request("first", prompt, 3))
    run_to_end(engine)
    engine.submit(request("second", prompt, 3))
    batch = engine.scheduler.schedule(time.monotonic())
    # The last full block is not taken from the cache whole: its last token must give logits.
    assert [entry.num_new_tokens for entry in batch.entries] == [4]
    assert batch.num_prefix_hits == 12 and batch.num_prefix_queries == 16


def test_different_cache_keys_do_not_share_blocks() -> None:
    engine = make_engine(block_size=4)
    prompt = list(range(16))
    engine.submit(replace(request("a", prompt, 2), cache_key="tenant a"))
    run_to_end(engine)
    engine.submit(replace(request("b", prompt, 2), cache_key="tenant b"))
    engine.submit(replace(request("c", prompt, 2), cache_key="tenant a"))
    events = run_to_end(engine)
    assert events["b"][0].num_cached_tokens == 0 and events["c"][0].num_cached_tokens == 12


def test_siblings_wait_for_the_first_to_fill_the_shared_blocks() -> None:
    engine = make_engine(block_size=4, max_num_batched_tokens=64)
    prompt = list(range(21))
    for index in range(4):
        engine.submit(request(f"s{index}", prompt, 3, group_id="g"))
    engine.submit(request("other", [900, 901], 3))
    first = engine.scheduler.schedule(time.monotonic())
    assert [entry.sequence.request_id for entry in first.entries] == ["s0", "other"]
    engine.scheduler.postprocess(first, engine.runner.collect(engine.runner.launch(first)), time.monotonic())
    events = run_to_end(engine)
    assert [events[f"s{index}"][0].num_cached_tokens for index in (1, 2, 3)] == [20, 20, 20]


def test_abort_frees_blocks_at_once_and_says_why() -> None:
    engine = make_engine()
    engine.submit(request("a", list(range(20)), 30))
    engine.submit(request("b", list(range(100, 120)), 30))
    engine.step()
    used = engine.scheduler.block_manager.counts.used
    engine.abort("a", AbortReason.CLIENT)
    engine.abort("b", AbortReason.STOP_STRING)
    engine.abort("never existed", AbortReason.CLIENT)
    assert used and not engine.scheduler.block_manager.counts.used
    events = {event.request_id: event for event in engine.step().events}
    assert events["a"].finish_reason is FinishReason.ABORT and events["b"].finish_reason is FinishReason.STOP
    assert not engine.has_work()


def test_a_deadline_ends_running_and_waiting_requests() -> None:
    engine = make_engine(max_num_seqs=1)
    for name in ("running", "waiting"):
        engine.submit(replace(request(name, [1, 2, 3], 50), deadline=time.monotonic() + 0.05))
    engine.step()
    time.sleep(0.06)
    events = run_to_end(engine)
    assert {name: reason_of(e) for name, e in events.items()} == dict.fromkeys(
        ("running", "waiting"), FinishReason.TIMEOUT
    )


def test_a_preempted_sequence_goes_on_where_it_was() -> None:
    engine = make_engine(num_blocks=8, block_size=4, max_model_len=32, max_num_batched_tokens=32)
    prompts = {"a": list(range(10)), "b": list(range(50, 60))}
    for name, prompt in prompts.items():
        engine.submit(request(name, prompt, 14))
    events = run_to_end(engine)
    for name, prompt in prompts.items():
        assert tokens_of(events[name]) == expected_output(prompt, 14)
    assert sum(events[name][-1].timings.num_preemptions for name in prompts) > 0  # type: ignore[union-attr]


def test_non_finite_logits_end_the_request_with_an_error() -> None:
    engine = make_engine()
    engine.submit(request("a", [1, 2], 5))
    collect = engine.runner.collect
    engine.runner.collect = lambda handle: [replace(row, token_id=None) for row in collect(handle)]  # type: ignore[method-assign]
    events = run_to_end(engine)["a"]
    assert reason_of(events) is FinishReason.ERROR and "not finite" in (events[-1].error or "")


def test_timings_are_in_order() -> None:
    engine = make_engine()
    engine.submit(request("a", [1, 2], 3))
    timings = run_to_end(engine)["a"][-1].timings
    assert timings is not None and timings.first_scheduled is not None and timings.first_token is not None
    assert timings.arrival <= timings.first_scheduled <= timings.first_token <= timings.finished
