"""Grammars under way: nobody else waits for them, and a request may end before its own has come."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.engine.matcher import GrammarFactory, GrammarQueue
from server.types import AbortReason, FinishReason
from tests.server.engine.fake_model import expected_output, make_engine, reason_of, request, run_to_end, tokens_of
from tests.server.real_edge import VOCAB_SIZE, tiny_checkpoint


class FreeMatcher:
    """Allows everything."""

    error = ""
    is_complete = False

    def accept(self, token_id: int) -> bool:
        return True


class SlowFactory:
    """Its futures are the test's to fulfil."""

    def __init__(self) -> None:
        self.futures: dict[str, Future[Any]] = {}

    def start(self, grammar: str) -> Future[Any]:
        return self.futures.setdefault(grammar, Future())


def test_others_go_on_while_a_grammar_is_compiled() -> None:
    engine, factory = make_engine(), SlowFactory()
    engine.grammars = GrammarQueue(factory)  # type: ignore[arg-type]
    engine.submit(request("guided", [1, 2, 3], 5, grammar="g"))
    engine.submit(request("plain", [4, 5, 6], 5))
    events = []
    while engine.scheduler.has_work():
        output = engine.step()
        assert output.stats.num_waiting == 1
        events += output.events
    assert tokens_of(events) == expected_output([4, 5, 6], 5) and {event.request_id for event in events} == {"plain"}
    assert engine.has_work() and engine.step().events == []
    factory.futures["g"].set_result(FreeMatcher())
    assert tokens_of(run_to_end(engine)["guided"]) == expected_output([1, 2, 3], 5)


def test_requests_end_while_their_grammar_is_compiled() -> None:
    engine, factory = make_engine(), SlowFactory()
    engine.grammars = GrammarQueue(factory)  # type: ignore[arg-type]
    for name in ("aborted", "bad"):
        engine.submit(request(name, [1, 2, 3], 5, grammar=name))
    engine.abort("aborted", AbortReason.CLIENT)
    factory.futures["bad"].set_exception(ValueError("the grammar cannot be used"))
    events = run_to_end(engine)
    assert reason_of(events["aborted"]) is FinishReason.ABORT
    [bad] = events["bad"]
    assert bad.finish_reason is FinishReason.ERROR and bad.is_request_fault and "cannot be used" in (bad.error or "")
    factory.futures["aborted"].set_result(FreeMatcher())
    assert not engine.has_work()


def test_a_deadline_passes_while_the_grammar_is_compiled() -> None:
    engine = make_engine()
    engine.grammars = GrammarQueue(SlowFactory())  # type: ignore[arg-type]
    engine.submit(replace(request("late", [1, 2, 3], 5, grammar="g"), deadline=time.monotonic() + 0.02))
    assert reason_of(run_to_end(engine)["late"]) is FinishReason.TIMEOUT


def test_matchers_of_one_grammar_do_not_share_their_place(tmp_path: Path) -> None:
    factory = GrammarFactory(tiny_checkpoint(tmp_path) / "tokenizer.json", VOCAB_SIZE, frozenset({2}))
    first, second = (factory.start('start: "ab"').result(10) for _ in range(2))
    token_of_a = next(token for token in range(VOCAB_SIZE) if first._matcher.deep_copy().consume_token(token))
    assert first.accept(token_of_a) and not first.accept(token_of_a)
    assert first.error and not second.error and second.accept(token_of_a)
    with pytest.raises(ValueError, match="cannot be used"):
        factory.start("start: nothing").result(10)
    factory.close()
