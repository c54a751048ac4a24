"""The queue's bounds: what counts, what is refused and with which words, and that nothing stays in the count."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from server.api.admission import Admission
from server.api.errors import RequestError
from server.types import (
    FinishReason,
    GenerateRequest,
    Pooling,
    PoolRequest,
    SamplingParams,
    StepOutput,
    StepStats,
    TokenEvent,
)
from tests.server.fakes import echo_engine, running_edge


class Queue:
    """An admission with a clock that the test sets."""

    def __init__(self, max_requests: int, max_tokens: int = 1000, num_seats: int = 4) -> None:
        self.now = 100.0
        self.reasons: list[str] = []
        self.admission = Admission(max_requests, max_tokens, num_seats, self.reasons.append, lambda: self.now)
        self._number = 0

    def submit(self, num_tokens: int = 10, *, pooled: bool = False) -> str:
        self._number += 1
        name, ids = f"r{self._number}", [1] * num_tokens
        sampling = SamplingParams(5)
        self.admission.on_submit(
            PoolRequest(name, ids, Pooling.LAST, 0.0) if pooled else GenerateRequest(name, ids, sampling, 0.0)
        )
        return name

    def step(self, *events: TokenEvent, running: int = 0, waiting: int = 0) -> None:
        self.admission.on_step(StepOutput(0, list(events), StepStats(running, waiting, 40, 0, 0)))

    def refusal(self, num_sequences: int = 1, num_tokens: int = 10) -> RequestError | None:
        try:
            self.admission.check(num_sequences, num_tokens)
        except RequestError as error:
            return error
        return None


def end(name: str) -> TokenEvent:
    return TokenEvent(name, [5], finish_reason=FinishReason.STOP)


def test_seats_are_no_queue() -> None:
    queue = Queue(2)
    for _ in range(6):
        assert queue.refusal() is None
        queue.submit()
    error = queue.refusal()
    assert error is not None and (error.status, error.code) == (429, "queue_full")
    assert "2 sequences wait, and 2 may" in error.message and queue.reasons == ["max_num_queued_reqs"]


def test_the_engine_says_how_many_seats_there_are() -> None:
    """With the KV cache full it runs fewer than it has seats for: the rest waits."""
    queue = Queue(2)
    for _ in range(4):
        queue.submit()
    queue.step(running=1, waiting=3)
    assert queue.admission.num_queued == 3 and queue.refusal() is not None
    queue.step(running=4)
    assert queue.admission.num_queued == 0 and queue.refusal() is None


def test_a_large_request_is_let_in_while_nothing_waits() -> None:
    queue = Queue(2)
    assert queue.refusal(num_sequences=128) is None
    for _ in range(5):
        queue.submit()
    assert queue.refusal(num_sequences=1) is None and queue.refusal(num_sequences=2) is not None
    queue = Queue(100, max_tokens=50)
    assert queue.refusal(num_tokens=5000) is None
    queue.submit(5000)
    error = queue.refusal(num_tokens=1)
    assert error is not None and "5000 prompt tokens wait, and 50 may" in error.message
    assert queue.reasons == ["max_num_queued_tokens"]


def test_no_queue_at_all() -> None:
    queue = Queue(0, num_seats=1)
    assert queue.refusal() is None
    queue.submit()
    assert queue.refusal() is not None


@pytest.mark.parametrize("pooled", [False, True])
def test_tokens_wait_until_the_first_token_and_everything_is_given_back(pooled: bool) -> None:
    queue = Queue(2)
    names = [queue.submit(100, pooled=pooled) for _ in range(4)]
    assert queue.admission.num_queued_tokens == 400
    queue.step(TokenEvent(names[0], [5]), running=4)
    assert queue.admission.num_queued_tokens == (300)
    queue.step(end(names[0]), end(names[0]), TokenEvent(names[1], [], finish_reason=FinishReason.ABORT), running=2)
    assert queue.admission.num_queued_tokens == 200
    queue.admission.on_lost(names)
    assert queue.admission.num_queued_tokens == 0 and queue.admission.num_queued == 0
    queue.admission.on_submit(GenerateRequest("again", [1] * 7, SamplingParams(1), 0.0))
    queue.admission.on_submit(GenerateRequest("again", [1] * 7, SamplingParams(1), 0.0))  # sent once more
    assert queue.admission.num_queued_tokens == 7


def test_retry_after_follows_what_was_worked_off() -> None:
    queue = Queue(1, num_seats=1)

    def retry_after() -> int:
        error = queue.refusal()
        assert error is not None and error.headers is not None
        return int(error.headers["Retry-After"])

    names = [queue.submit() for _ in range(2)]
    assert retry_after() == 5  # nothing is known
    for name in names:  # one every 4 seconds
        queue.step(end(name), running=1, waiting=1)
        queue.submit()
        queue.now += 4
    assert retry_after() == 4
    queue.now += 1000
    queue.step(end("r3"), running=1, waiting=1)  # the past is forgotten
    queue.submit()
    assert retry_after() == 1


def test_over_http() -> None:
    engine = echo_engine()
    engine.gate.clear()
    reasons: list[str] = []

    async def check() -> None:
        admission = Admission(3, 10_000, 2, reasons.append)
        async with running_edge(engine, admission=admission) as edge:

            def post(path: str, **body: Any) -> asyncio.Task[httpx.Response]:
                return asyncio.ensure_future(edge.http.post(path, json=body))

            first = post("/v1/completions", prompt="The dog", max_tokens=2, n=2)
            second = post("/v1/completions", prompt=["a", "b"], max_tokens=2)
            while edge.client.num_unfinished < 4:
                await asyncio.sleep(0.005)
            refused = await post("/v1/completions", prompt="a", n=2, max_tokens=2)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            refused = await post("/v1/embeddings", input=["a", "b"])
            assert refused.status_code == 429
            third = post("/v1/completions", prompt="a", max_tokens=2, stream=True)
            while edge.client.num_unfinished < 5:
                await asyncio.sleep(0.005)
            # Now nothing at all is let in, whatever it says: it is not even read.
            for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"):
                refused = await edge.http.post(path, content=b"{", headers={"Content-Type": "application/json"})
                assert refused.status_code == 429, path
            refused = await post("/v1/messages")
            assert refused.json() == {
                "type": "error",
                "error": {"type": "rate_limit_error", "message": refused.json()["error"]["message"]},
            }
            assert (await post("/tokenize", prompt="a")).status_code == 200  # asks nothing of the engine
            assert edge.client.num_unfinished == 5
            engine.gate.set()
            for running in (first, second, third):
                assert (await running).status_code == 200
            assert admission.num_queued == 0 and admission.num_queued_tokens == 0
            assert (await post("/v1/completions", prompt="a", n=20, max_tokens=2)).status_code == 200
            assert set(reasons) == {"max_num_queued_reqs"}

    asyncio.run(check())


def test_a_client_that_leaves_gives_its_place_back() -> None:
    engine = echo_engine(step_seconds=0.001)

    async def check() -> None:
        admission = Admission(1, 10_000, 1)
        async with running_edge(engine, admission=admission) as edge:
            body = {"prompt": "The dog", "max_tokens": 400, "ignore_eos": True}
            running = asyncio.ensure_future(edge.http.post("/v1/completions", json=body))
            while not engine.running:
                await asyncio.sleep(0.005)
            running.cancel()
            while edge.client.num_unfinished:
                await asyncio.sleep(0.005)
            assert admission.num_queued_tokens == 0

    asyncio.run(check())
