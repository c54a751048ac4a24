"""Priorities: whoever is more urgent goes first, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.config import EngineConfig
from server.engine.engine import Engine, build_engine
from tests.server.engine.fake_model import expected_output, make_engine, request, run_to_end, tokens_of
from tests.server.fakes import running_edge
from tests.server.real_edge import tiny_checkpoint

AGING = 4.0
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(-3, 3), st.integers(1, 20), st.integers(1, 10)), min_size=2, max_size=24
)  # seconds (and steps) after the one before, priority, length of the prompt, of the output


def serve(engine: Engine, arrivals: list[tuple[int, int, int, int]]) -> dict[str, int]:
    """Runs all, one second per step. The order in which they were first scheduled, by their index."""
    order: dict[str, int] = {}
    times = list(itertools.accumulate(arrival[0] for arrival in arrivals))
    left = list(enumerate(arrivals))

    def on_step(step: int) -> None:
        for sequence in engine.scheduler.running:
            order.setdefault(sequence.request_id, len(order))
        while left and (times[left[0][0]] <= step or not engine.has_work()):
            index, (_, priority, prompt_length, max_tokens) = left.pop(0)
            made = request(str(index), list(range(index, index + prompt_length)), max_tokens)
            engine.submit(replace(made, priority=priority, arrival_time=float(times[index])))

    scheduler, schedule = engine.scheduler, engine.scheduler.schedule

    def watched(now: float):  # type: ignore[no-untyped-def]
        batch = schedule(now)
        for entry in batch.entries:
            order.setdefault(entry.sequence.request_id, len(order))
        return batch

    scheduler.schedule = watched  # type: ignore[method-assign]
    events = run_to_end(engine, on_step)
    for index, (_, _, prompt_length, max_tokens) in enumerate(arrivals):
        assert tokens_of(events[str(index)]) == expected_output(list(range(index, index + prompt_length)), max_tokens)
    return order


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arrivals=ARRIVALS, num_blocks=st.integers(16, 40), max_num_seqs=st.integers(1, 4))
def test_who_arrives_late_enough_never_goes_before(
    arrivals: list[tuple[int, int, int, int]], num_blocks: int, max_num_seqs: int
) -> None:
    """The bound on waiting: p is passed over by q < p only if that arrives within (p - q) * AGING seconds; by its equals and
    those behind it, never. And outputs are those of any other order, preemption included."""
    engine = make_engine(
        num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_model_len=64, priority_aging_seconds=AGING
    )
    order = serve(engine, arrivals)
    times = list(itertools.accumulate(arrival[0] for arrival in arrivals))
    for first, second in itertools.combinations(range(len(arrivals)), 2):
        head_start = (arrivals[first][1] - arrivals[second][1]) * AGING
        if times[second] - times[first] >= head_start:
            assert order[str(first)] < order[str(second)]


def test_the_urgent_go_first_and_the_patient_in_the_end() -> None:
    burst = [(0, 0, 4, 6), (0, 2, 4, 6), (0, 2, 4, 6), *[(0, 0, 4, 6)] * 3, *[(2, 0, 4, 6)] * 8]
    with_priorities = serve(make_engine(max_num_seqs=1, priority_aging_seconds=AGING), burst)
    assert with_priorities["3"] < with_priorities["1"] < with_priorities["2"]
    later = [index for index in range(6, 14) if with_priorities[str(index)] > with_priorities["1"]]
    assert later and later[0] <= 6 + 4  # those that came 8 seconds later at most
    without = serve(make_engine(max_num_seqs=1), burst)
    assert list(without) == [str(index) for index in range(len(burst))]


def test_the_least_urgent_is_preempted() -> None:
    engine = make_engine(num_blocks=16, block_size=4, max_num_seqs=2, priority_aging_seconds=AGING)
    for name, priority, start in (("patient", 3, 0), ("urgent", 0, 40)):
        made = request(name, list(range(start, start + 20)), 30)
        engine.submit(replace(made, priority=priority, arrival_time=0.0))
        engine.step()
    events = run_to_end(engine)
    preemptions = {name: of[-1].timings.num_preemptions for name, of in events.items()}  # type: ignore[union-attr]
    assert preemptions["patient"] > 0 and preemptions["urgent"] == 0


def test_priorities_reach_the_engine_where_they_count() -> None:
    async def check() -> None:
        async with running_edge(has_priorities=True) as edge:
            for path, prompt in (
                ("/v1/completions", {"prompt": "a"}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ):
                answer = await edge.http.post(path, json={**prompt, "max_tokens": 1, "priority": -5})
                assert answer.status_code == 200 and edge.engine.submitted[-1].priority == -5
        async with running_edge() as edge:
            body = {"prompt": "a", "max_tokens": 1, "priority": 0}
            assert (await edge.http.post("/v1/completions", json=body)).status_code == 200

    asyncio.run(check())


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_option_reaches_the_scheduler(tmp_path: Path, policy: str) -> None:
    config = EngineConfig(
        str(tiny_checkpoint(tmp_path)), max_model_len=64, kernel_backend="reference", kv_cache_memory_bytes=2**20,
        scheduling_policy=policy, priority_aging_seconds=7.0,
    )  # fmt: skip
    assert build_engine(config).scheduler.priority_aging_seconds == (7.0 if policy == "priority" else None)
