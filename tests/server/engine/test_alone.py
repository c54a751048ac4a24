"""Requests that are retried after a crash: each alone in its steps until its first token, before all others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.types import AbortReason, Pooling, PoolRequest
from tests.server.engine.fake_model import expected_output, make_engine, request, run_to_end, tokens_of


@pytest.mark.parametrize("num_blocks", [64, 16])  # of 4 tokens: room for all, and for one and a half
def test_they_share_no_step_before_their_first_token(num_blocks: int) -> None:
    engine = make_engine(num_blocks=num_blocks, max_num_batched_tokens=8, max_num_seqs=3)
    steps: list[list[str]] = []
    engine.on_launch = lambda ids, _: steps.append(ids)
    prompts = {name: [index * 7 + offset for offset in range(20)] for index, name in enumerate("abcdefg")}
    for name in "ab":
        engine.submit(request(name, prompts[name], 12))
    events: dict[str, list] = {}
    for _ in range(4):
        for event in engine.step().events:
            events.setdefault(event.request_id, []).append(event)
    for name in "cdefg":
        engine.submit(replace(request(name, prompts[name], 12), alone=name in "efg"))
    engine.abort("f", AbortReason.CLIENT)
    del steps[:]
    for name, of_one in run_to_end(engine).items():
        events.setdefault(name, []).extend(of_one)
    assert steps[:6] == [["e"]] * 3 + [["g"]] * 3  # 20 tokens by 8
    assert any(len(step) > 1 for step in steps[6:])
    for name in "abcdeg":
        assert tokens_of(events[name]) == expected_output(prompts[name], 12), name


def test_prompts_to_embed_are_alone_to_their_end() -> None:
    engine = make_engine(max_num_batched_tokens=8)
    request_ = PoolRequest("p", list(range(20)), Pooling.LAST, 0.0, alone=True)
    engine.submit(request("a", [1, 2, 3], 4))
    engine.submit(request_)
    for expected in (["p"], ["p"]):
        batch = engine.scheduler.schedule(0.0)
        assert [entry.sequence.request_id for entry in batch.entries] == expected
        for entry in batch.entries:
            entry.sequence.num_computed_tokens += entry.num_new_tokens
