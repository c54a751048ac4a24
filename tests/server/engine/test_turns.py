"""Clients take turns: nobody's flood of prompts delays the others by more than a chunk of each."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.app import Gate
from server.engine.engine import Engine
from server.keys import parse_keys
from server.types import AbortReason, GenerateRequest
from tests.server.engine.fake_model import expected_output, make_engine, request, run_to_end, tokens_of
from tests.server.fakes import running_edge

BUDGET = 32  # tokens of a step
LENGTHS = st.lists(st.integers(1, 120), min_size=1, max_size=6)


def made(name: str, client: str, length: int, first: int, max_tokens: int = 1) -> GenerateRequest:
    return replace(request(name, list(range(first, first + length)), max_tokens), client=client)


def roomy_engine(**options: float) -> Engine:
    """With seats and blocks for all."""
    return make_engine(
        num_blocks=2048, block_size=4, max_num_batched_tokens=BUDGET, max_num_seqs=32, max_model_len=128, **options
    )


def steps_until_begun(engine: Engine, name: str) -> int:
    """Steps up to the one that computes tokens of this request, for the first time."""
    schedule, begun = engine.scheduler.schedule, []

    def watched(now: float):  # type: ignore[no-untyped-def]
        batch = schedule(now)
        begun.append(any(entry.sequence.request_id == name for entry in batch.entries))
        return batch

    engine.scheduler.schedule = watched  # type: ignore[method-assign]
    while not any(begun):
        engine.step()
    engine.scheduler.schedule = schedule  # type: ignore[method-assign]
    return len(begun)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    floods=st.lists(LENGTHS, min_size=1, max_size=4), num_steps=st.integers(0, 12), length=st.integers(1, BUDGET // 2)
)
def test_who_comes_late_waits_for_a_chunk_of_each_other_client(
    floods: list[list[int]], num_steps: int, length: int
) -> None:
    engine = roomy_engine()
    requests = [
        made(f"{client}-{index}", str(client), size, 200 * client + index)
        for client, lengths in enumerate(floods)
        for index, size in enumerate(lengths)
    ]
    for one in requests:
        engine.submit(one)
    for _ in range(num_steps):
        engine.step()
    late = made("late", "late", length, 900)
    engine.submit(late)
    assert steps_until_begun(engine, "late") <= len(floods) + 1
    events = run_to_end(engine)
    for one in (*requests, late):
        if one.request_id in events and tokens_of(events[one.request_id]):
            assert tokens_of(events[one.request_id]) == expected_output(one.prompt_token_ids, 1)
    assert not engine.has_work()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=12), num_blocks=st.integers(32, 64))
def test_one_client_is_served_in_the_order_of_arrival(lengths: list[int], num_blocks: int) -> None:
    """Whatever its name, preemption included: chunk by chunk as it was before there were turns."""
    engine = make_engine(num_blocks=num_blocks, max_num_batched_tokens=BUDGET, max_num_seqs=4, max_model_len=128)
    order: dict[str, None] = {}
    schedule = engine.scheduler.schedule

    def watched(now: float):  # type: ignore[no-untyped-def]
        batch = schedule(now)
        order.update(dict.fromkeys(entry.sequence.request_id for entry in batch.entries))
        return batch

    engine.scheduler.schedule = watched  # type: ignore[method-assign]
    for index, length in enumerate(lengths):
        engine.submit(made(str(index), "one", length, 70 * index, max_tokens=8))
    run_to_end(engine)
    assert list(order) == [str(index) for index in range(len(lengths))]


def test_two_floods_share_by_tokens() -> None:
    engine = roomy_engine()
    floods = {"long": [100] * 6, "short": [10] * 20}
    for client, lengths in floods.items():  # all the long ones first
        for index, length in enumerate(lengths):
            engine.submit(made(f"{client}-{index}", client, length, 7 * index + 500 * (client == "short")))
    schedule, computed = engine.scheduler.schedule, dict.fromkeys(floods, 0)

    def watched(now: float):  # type: ignore[no-untyped-def]
        batch = schedule(now)
        for entry in batch.entries:
            computed[entry.sequence.request.client] += entry.num_new_tokens
        return batch

    engine.scheduler.schedule = watched  # type: ignore[method-assign]
    while computed["short"] < 180:
        engine.step()
        assert abs(computed["long"] - computed["short"]) <= 2 * BUDGET
    run_to_end(engine)
    assert computed == {"long": 600, "short": 200}


def test_requests_that_were_given_up_cost_their_client_nothing() -> None:
    """Neither one that waited behind them nor one that comes later."""
    engine = roomy_engine()
    for index in range(12):
        engine.submit(made(f"other-{index}", "other", 100, 10 * index))
    for index in range(20):
        engine.submit(made(f"given-up-{index}", "one", 120, 500 + index))
    engine.submit(made("behind", "one", 4, 900))
    engine.step()
    for index in range(20):
        engine.abort(f"given-up-{index}", AbortReason.CLIENT)
    assert steps_until_begun(engine, "behind") <= 3
    engine.submit(made("later", "one", 4, 950))
    assert steps_until_begun(engine, "later") <= 3
    run_to_end(engine)


def test_priorities_come_before_turns() -> None:
    engine = roomy_engine(priority_aging_seconds=4.0)
    for index in range(4):
        engine.submit(replace(made(f"flood-{index}", "flood", 100, index), arrival_time=0.0))
    engine.step()
    engine.submit(replace(made("late", "late", 4, 900), arrival_time=1.0))
    assert steps_until_begun(engine, "late") > 10


def test_the_name_of_the_key_reaches_the_engine() -> None:
    async def check() -> None:
        for keys, name in (((), ""), (tuple(parse_keys(["alice:alice-0123456789"], "test")), "alice")):
            async with running_edge(gate=Gate(keys)) as edge:
                headers = {"Authorization": "Bearer alice-0123456789"}
                body = {"prompt": "a", "max_tokens": 1}
                answer = await edge.http.post("/v1/completions", json=body, headers=headers)
                assert answer.status_code == 200 and edge.engine.submitted[-1].client == name

    asyncio.run(check())
