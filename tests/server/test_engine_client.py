"""The engine's process and client: what passes the pipe, and what happens when either side goes away."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import EngineConfig
from server.engine import codec
from server.engine.client import EngineClient, EngineState, EngineUnavailable, Mailbox
from server.engine.observer import NoObserver
from server.engine.process import ProcessHandle, spawn_engine, thread_engine
from server.types import (
    AbortReason,
    AbortRequest,
    EngineFailure,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    Shutdown,
    StepOutput,
    TokenEvent,
)
from tests.server.fakes import EchoEngine, echo_engine

MESSAGES = st.one_of(
    *(
        st.builds(message)
        for message in (GenerateRequest, AbortRequest, Shutdown, StepOutput, EngineInfo, EngineFailure)
    )
)


def _request(name: str, max_tokens: int = 5, prompt: list[int] | None = None) -> GenerateRequest:
    return GenerateRequest(name, prompt or [10, 11, 12], SamplingParams(max_tokens), time.monotonic())


async def _collect(mailbox: Mailbox) -> list[TokenEvent]:
    """Events up to a finish reason."""
    events: list[TokenEvent] = []
    while not events or events[-1].finish_reason is None:
        events += await asyncio.wait_for(mailbox.get(), 20)
    return events


def _client(engine: EchoEngine) -> EngineClient:
    return EngineClient(lambda epoch: thread_engine(lambda: engine, epoch))


@given(message=MESSAGES.filter(lambda message: _is_finite(message)))
def test_messages_survive_the_codec(message: Any) -> None:
    assert codec.decode(codec.encode(message)) == message


def _is_finite(message: Any) -> bool:
    """NaN is not equal to itself; 64 bits are what the wire carries."""
    try:
        return "nan" not in repr(message) and codec.decode(codec.encode(message)) is not None
    except OverflowError:
        return False


def test_bytes_that_are_no_message_are_refused() -> None:
    for data in (b"", b"\xff", b"\x00", b"\x00\x81\xa1a\x01"):
        with pytest.raises(ValueError):
            codec.decode(data)


def test_events_reach_their_own_mailbox() -> None:
    async def check() -> None:
        client = _client(echo_engine())
        info = await client.start()
        assert info.max_model_len == 512
        assert client.state is EngineState.READY
        boxes = {name: Mailbox() for name in "abc"}
        for number, (name, box) in enumerate(boxes.items()):
            client.submit(_request(name, 5, [number + 1, number + 101]), box)
        for number, (name, box) in enumerate(boxes.items()):
            events = await _collect(box)
            assert {event.request_id for event in events} == {name}
            tokens = [token for event in events for token in event.token_ids]
            assert tokens == [number + 1, number + 101, number + 1, number + 101, number + 1]
        assert client.num_unfinished == 0
        await client.stop()
        with pytest.raises(EngineUnavailable):
            client.submit(_request("d"), Mailbox())

    asyncio.run(check())


def test_abort_silences_the_request_and_drain_waits_for_the_engine() -> None:
    async def check() -> None:
        engine = echo_engine(step_seconds=0.002)
        client = _client(engine)
        await client.start()
        box = Mailbox()
        client.submit(_request("a", 400), box)
        await box.get()
        client.abort("a", AbortReason.CLIENT)
        client.abort("a", AbortReason.CLIENT)  # once is enough
        client.abort("unknown", AbortReason.CLIENT)
        assert await client.drain(10)
        assert engine.aborted == [("a", AbortReason.CLIENT)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(box.get(), 0.05)
        await client.stop()

    asyncio.run(check())


def test_a_request_that_the_engine_refuses_ends_alone() -> None:
    async def check() -> None:
        client = _client(echo_engine(max_model_len=16))
        await client.start()
        refused, served = Mailbox(), Mailbox()
        client.submit(_request("long", 100), refused)
        client.submit(_request("short", 4), served)
        [event] = await _collect(refused)
        assert (event.finish_reason, event.error) == (FinishReason.ERROR, "does not fit")
        assert (await _collect(served))[-1].finish_reason is FinishReason.LENGTH
        await client.stop()

    asyncio.run(check())


def test_stop_ends_running_requests_with_abort() -> None:
    async def check() -> None:
        engine = echo_engine(step_seconds=0.002)
        client = _client(engine)
        await client.start()
        box = Mailbox()
        client.submit(_request("a", 400), box)
        await box.get()
        await client.stop()
        assert (await _collect(box))[-1].finish_reason is FinishReason.ABORT
        assert engine.is_closed

    asyncio.run(check())


def test_late_events_of_another_epoch_are_dropped() -> None:
    class Stale(EchoEngine):
        def step(self) -> StepOutput:
            output = super().step()
            return replace(output, epoch=output.epoch - 1)

    async def check() -> None:
        client = _client(Stale(echo_engine().info))
        await client.start()
        box = Mailbox()
        client.submit(_request("a"), box)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(box.get(), 0.2)
        await client.stop(timeout=0.2)

    asyncio.run(check())


def test_a_failure_to_build_is_the_reason_given() -> None:
    def build() -> EchoEngine:
        raise ValueError("model.safetensors: truncated")

    async def check() -> None:
        client = EngineClient(lambda epoch: thread_engine(build, epoch))
        with pytest.raises(EngineUnavailable, match="truncated"):
            await client.start()
        assert client.state is EngineState.DEAD
        await client.stop()

    asyncio.run(check())


class _Lost(NoObserver):
    """An observer that remembers what was lost."""

    def __init__(self) -> None:
        self.ids: set[str] = set()

    def on_lost(self, request_ids: Iterable[str], reason: FinishReason) -> None:
        assert reason is FinishReason.ERROR
        self.ids |= set(request_ids)


def _spawned(epoch: int, sink: list[ProcessHandle]) -> ProcessHandle:
    """A real engine process. Its model does not exist, so it fails to build; stopped before, it just waits."""
    handle = spawn_engine(EngineConfig("/nonexistent/model"), epoch, "critical")
    sink.append(handle)
    return handle


def test_a_real_process_says_why_it_cannot_start_and_ends() -> None:
    handles: list[ProcessHandle] = []

    async def check() -> None:
        client = EngineClient(lambda epoch: _spawned(epoch, handles))
        with pytest.raises(EngineUnavailable, match=r"config\.json|nonexistent"):
            await asyncio.wait_for(client.start(), 60)
        await client.stop()

    asyncio.run(check())
    [handle] = handles
    assert not handle.process.is_alive()
    assert handle.process.exitcode == 1


def test_a_killed_process_answers_the_start_at_once() -> None:
    handles: list[ProcessHandle] = []

    async def check() -> None:
        client = EngineClient(lambda epoch: _spawned(epoch, handles))
        starting = asyncio.ensure_future(client.start())
        await asyncio.sleep(0)
        pid = handles[0].process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineUnavailable, match="SIGKILL"):
            await asyncio.wait_for(starting, 10)
        await client.stop()

    asyncio.run(check())


def test_an_engine_whose_pipe_ends_reports_all_requests_lost() -> None:
    async def check() -> None:
        engine = echo_engine(step_seconds=0.01)
        client = _client(engine)
        await client.start()
        client.observer = lost = _Lost()
        boxes = {name: Mailbox() for name in "ab"}
        for name, box in boxes.items():
            client.submit(_request(name, 400), box)
            await box.get()
        engine.fail_on_token = 10
        for box in boxes.values():
            assert (await _collect(box))[-1].finish_reason is FinishReason.ERROR
        assert lost.ids == {"a", "b"}
        assert client.state is EngineState.RESTARTING
        await client.stop()
        assert client.state is EngineState.DEAD

    asyncio.run(check())
