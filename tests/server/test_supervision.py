"""What happens when the engine's process crashes or hangs: who is answered what, and what comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from server.engine.client import EngineClient, EngineState, EngineUnavailable, Mailbox, RequestRefused
from server.engine.process import ProcessHandle, thread_engine
from server.engine.supervisor import TICK, CrashRow, Stall, SupervisorPolicy, Suspects, fingerprint
from server.types import (
    AbortReason,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Pooling,
    PoolRequest,
    SamplingParams,
    StepOutput,
    TokenEvent,
)
from tests.server.crashing import HANG, KILL, KILL_FIRST, RAISE, SEGFAULT, crashing_engine
from tests.server.fakes import echo_engine

POLICY = SupervisorPolicy(min_step_seconds=0.6, delays=(0.0, 0.05))


class Recorder:
    """An observer that counts the ends of requests, whoever tells of them."""

    def __init__(self) -> None:
        self.ends: dict[str, list[FinishReason]] = {}
        self.num_retried = self.num_restarts = self.num_refused = 0

    def on_submit(self, request: GenerateRequest | PoolRequest) -> None:
        self.ends[request.request_id] = []

    def on_step(self, output: StepOutput) -> None:
        for event in output.events:
            if event.finish_reason is not None:
                self.ends[event.request_id].append(event.finish_reason)

    def on_lost(self, request_ids: list[str], reason: FinishReason) -> None:
        for request_id in request_ids:
            self.ends[request_id].append(reason)

    def on_crash(self, num_retried: int) -> None:
        self.num_retried += num_retried

    def on_start(self, info: EngineInfo, is_restart: bool) -> None:
        self.num_restarts += is_restart

    def on_refused(self) -> None:
        self.num_refused += 1


class Bench:
    """A client over crashing engines, and what its requests were answered."""

    def __init__(self, policy: SupervisorPolicy, fails_from: int | None) -> None:
        self.handles: list[ProcessHandle] = []
        self.fails_from = fails_from
        self.max_model_len = 512
        self.launch_errors: list[Exception] = []
        self.client = EngineClient(self.launch, policy)
        self.client.observer = self.recorder = Recorder()
        self.boxes: dict[str, Mailbox] = {}

    def launch(self, epoch: int) -> ProcessHandle:
        if self.launch_errors:
            raise self.launch_errors.pop(0)
        fails = self.fails_from is not None and epoch >= self.fails_from
        self.handles.append(crashing_engine(epoch, fails, self.max_model_len))
        return self.handles[-1]

    def submit(self, name: str, prompt: list[int], max_tokens: int = 5) -> Mailbox:
        self.boxes[name] = Mailbox()
        request = GenerateRequest(name, prompt, SamplingParams(max_tokens), time.monotonic())
        self.client.submit(request, self.boxes[name])
        return self.boxes[name]

    async def end(self, name: str) -> tuple[list[int], TokenEvent]:
        """All tokens of a request, and its last event. It must be answered once."""
        events: list[TokenEvent] = []
        while not events or events[-1].finish_reason is None:
            events += await asyncio.wait_for(self.boxes[name].get(), 20)
        assert sum(event.finish_reason is not None for event in events) == 1
        assert self.recorder.ends[name] == [events[-1].finish_reason]
        return [token for event in events for token in event.token_ids], events[-1]

    async def until(self, state: EngineState) -> None:
        async with asyncio.timeout(20):
            while self.client.state is not state:
                await asyncio.sleep(0.005)

    def kill(self, number: int = signal.SIGKILL) -> None:
        pid = self.handles[-1].process.pid
        assert pid is not None
        os.kill(pid, number)


def run(
    check: Callable[[Bench], Awaitable[None]], policy: SupervisorPolicy = POLICY, fails_from: int | None = None
) -> Bench:
    """Whatever the check does, nothing of it is left: no thread, no process, no request."""

    async def whole() -> Bench:
        bench = Bench(policy, fails_from)
        await bench.client.start()
        try:
            await check(bench)
        finally:
            await bench.client.stop()
        return bench

    threads = set(threading.enumerate())
    bench = asyncio.run(whole())
    assert bench.client.num_unfinished == 0
    assert all(len(ends) == 1 for ends in bench.recorder.ends.values()), bench.recorder.ends
    assert not any(handle.is_alive() for handle in bench.handles)
    assert all(handle.connection.closed for handle in bench.handles)
    left = [thread for thread in threading.enumerate() if thread not in threads and "engine" in thread.name]
    assert not left
    return bench


@pytest.mark.parametrize("poison", [KILL, SEGFAULT, RAISE, HANG])
def test_a_poisonous_request_ends_with_an_error_and_takes_nobody_with_it(poison: int) -> None:
    async def check(bench: Bench) -> None:
        others = {f"other-{index}": [index + 1, index + 101] for index in range(6)}
        for name, prompt in list(others.items())[:3]:
            bench.submit(name, prompt)
        bench.submit("poison", [7, poison])
        for name, prompt in list(others.items())[3:]:
            bench.submit(name, prompt)
        tokens, last = await bench.end("poison")
        assert tokens == [] and last.finish_reason is FinishReason.ERROR
        assert last.error is not None and "again when it was retried" in last.error
        for name, prompt in others.items():
            tokens, last = await bench.end(name)
            assert last.finish_reason is FinishReason.LENGTH and tokens == [*prompt, *prompt, prompt[0]]
        with pytest.raises(RequestRefused, match=r"refused for another \d+ seconds"):
            bench.submit("poison again", [7, poison])
        bench.submit("like it", [7, poison + 50])
        await bench.end("like it")

    bench = run(check)
    assert bench.recorder.num_restarts == 2 and bench.recorder.num_refused == 1
    assert bench.recorder.num_retried >= 4


def test_what_has_delivered_tokens_ends_with_an_error_and_the_rest_is_answered_in_full() -> None:
    async def check(bench: Bench) -> None:
        for index in range(3):
            await bench.submit(f"begun-{index}", [1, 2], 10_000).get()
        aborted = bench.submit("aborted", [1, 2], 10_000)
        await aborted.get()
        bench.client.abort("aborted", AbortReason.STOP_STRING)
        bench.submit("new", [5, 6], 4)
        bench.kill()
        await bench.until(EngineState.RESTARTING)
        with pytest.raises(EngineUnavailable, match="starting anew") as refused:
            bench.submit("late", [5])
        assert refused.value.retry_after >= 1
        bench.client.abort("new", AbortReason.CLIENT)
        await bench.until(EngineState.READY)
        for index in range(3):
            tokens, last = await bench.end(f"begun-{index}")
            assert last.finish_reason is FinishReason.ERROR and set(tokens) <= {1, 2}
        bench.submit("after", [5, 6], 4)
        assert (await bench.end("after"))[0] == [5, 6, 5, 6]
        assert bench.recorder.ends["aborted"] == [FinishReason.STOP]
        assert bench.recorder.ends["new"] == [FinishReason.ABORT]

    assert run(check).recorder.num_restarts == 1


def test_prompts_to_embed_are_retried_too() -> None:
    async def check(bench: Bench) -> None:
        boxes = {}
        for index in range(3):
            boxes[f"pool-{index}"] = Mailbox()
            prompt = [index + 1, KILL_FIRST]
            request = PoolRequest(f"pool-{index}", prompt, Pooling.MEAN, time.monotonic())
            bench.client.submit(request, boxes[f"pool-{index}"])
        for index, box in enumerate(boxes.values()):
            [event] = await asyncio.wait_for(box.get(), 20)
            assert event.embedding == [1.0, index + 1.0]

    assert run(check).recorder.num_retried == 3


def test_a_stopped_process_is_noticed_while_there_is_work_and_not_before() -> None:
    async def check(bench: Bench) -> None:
        bench.kill(signal.SIGSTOP)
        await asyncio.sleep(1.2)
        assert bench.client.state is EngineState.READY
        begin = time.monotonic()
        bench.submit("a", [1, 2])
        await bench.until(EngineState.RESTARTING)
        assert POLICY.min_step_seconds <= time.monotonic() - begin < POLICY.min_step_seconds + 6 * TICK + 0.5
        assert "no step has ended within 0.6 s" in bench.client.failure
        assert (await bench.end("a"))[0] == [1, 2, 1, 2, 1]  # had not begun: no retry was used up

    assert run(check).recorder.num_retried == 0


def test_an_engine_that_crashes_over_and_over_is_given_up() -> None:
    async def check(bench: Bench) -> None:
        bench.submit("a", [1, 2], 10_000)
        await bench.boxes["a"].get()
        bench.fails_from = 1
        bench.kill()
        await asyncio.wait_for(bench.client.died.wait(), 30)
        assert bench.client.state is EngineState.DEAD and len(bench.handles) == POLICY.max_crashes
        assert "5 crashes in a row" in bench.client.failure and "does not load" in bench.client.failure
        with pytest.raises(EngineUnavailable, match="down"):
            bench.submit("b", [1])
        assert (await bench.end("a"))[1].finish_reason is FinishReason.ERROR

    run(check)


def test_a_drain_goes_on_through_a_crash_and_a_stop_in_a_restart_answers_everybody() -> None:
    async def check(bench: Bench) -> None:
        for index in range(6):
            bench.submit(f"{index}", [index + 1, KILL_FIRST], 3)
        bench.client.refuse_new()
        assert bench.client.state is EngineState.DRAINING
        assert await bench.client.drain(20)
        for index in range(6):
            assert len((await bench.end(f"{index}"))[0]) == 3

    assert run(check).recorder.num_restarts == 1

    async def stop_in_restart(bench: Bench) -> None:
        for index in range(6):
            bench.submit(f"{index}", [index + 1, KILL_FIRST], 3)
        await bench.until(EngineState.RESTARTING)
        await bench.client.stop()
        for index in range(6):
            assert (await bench.end(f"{index}"))[1].finish_reason is FinishReason.ERROR

    run(stop_in_restart)


def test_a_reload_replaces_the_engine_and_one_that_fails_brings_the_former_back() -> None:
    async def check(bench: Bench) -> None:
        bench.submit("running", [1, 2], 20)
        await bench.boxes["running"].get()
        reloading = asyncio.ensure_future(bench.client.reload(bench.launch, 10))
        await asyncio.sleep(0)
        assert bench.client.state is EngineState.RELOADING
        await reloading
        assert len((await bench.end("running"))[0]) == 19  # and the one that was read above
        assert bench.client.state is EngineState.READY and len(bench.handles) == 2
        bench.submit("cut short", [1, 2], 10_000)
        await bench.boxes["cut short"].get()

        def broken(epoch: int) -> ProcessHandle:
            bench.handles.append(crashing_engine(epoch, fails_to_load=True))
            return bench.handles[-1]

        with pytest.raises(EngineUnavailable, match="does not load"):
            await bench.client.reload(broken, 0.05)
        assert (await bench.end("cut short"))[1].finish_reason is FinishReason.ABORT
        await bench.until(EngineState.READY)
        bench.submit("after", [5, 6], 4)
        assert (await bench.end("after"))[0] == [5, 6, 5, 6]

    run(check)


def test_an_engine_with_less_room_gets_no_more_than_fits() -> None:
    async def check(bench: Bench) -> None:
        bench.submit("long", [1] * 400 + [KILL_FIRST], 3)
        bench.submit("short", [1, 2, KILL_FIRST], 3)
        bench.max_model_len = 100
        await bench.until(EngineState.RESTARTING)
        assert (await bench.end("long"))[1].finish_reason is FinishReason.ERROR
        assert (await bench.end("short"))[0] == [1, 2, KILL_FIRST]

    run(check)


def test_a_thread_that_hangs_is_the_end() -> None:
    async def check() -> None:
        engine = echo_engine()
        client = EngineClient(lambda epoch: thread_engine(lambda: engine, epoch), POLICY)
        await client.start()
        engine.gate.clear()
        box = Mailbox()
        client.submit(GenerateRequest("a", [1, 2], SamplingParams(3), time.monotonic()), box)
        await asyncio.wait_for(client.died.wait(), 20)
        assert "cannot be ended" in client.failure
        assert (await box.get())[-1].finish_reason is FinishReason.ERROR
        engine.gate.set()
        await client.stop()

    asyncio.run(check())


def test_launching_may_fail_and_is_tried_again() -> None:
    async def check(bench: Bench) -> None:
        bench.client.submit(
            GenerateRequest("a", [1, KILL_FIRST], SamplingParams(2), time.monotonic()),
            bench.boxes.setdefault("a", Mailbox()),
        )
        bench.launch_errors = [OSError(24, "Too many open files"), RuntimeError("can't start new thread")]
        assert (await bench.end("a"))[0] == [1, KILL_FIRST]

    assert run(check).recorder.num_restarts == 1

    async def bug(bench: Bench) -> None:
        bench.submit("a", [1, KILL_FIRST], 2)
        bench.launch_errors = [ZeroDivisionError("a bug")]
        assert (await bench.end("a"))[1].finish_reason is FinishReason.ERROR
        assert bench.client.died.is_set() and "a bug" in bench.client.failure

    run(bug)


def test_a_late_look_does_not_blame_the_engine() -> None:
    stall, now = Stall(), 100.0
    assert stall.look("a", now) == 0
    assert stall.look("a", now + TICK) == TICK
    assert stall.look("a", now + 3600) == 3 * TICK  # this process was stopped for an hour
    assert stall.look("b", now + 3601) == 0


def test_limits_follow_what_was_predicted_and_measured() -> None:
    policy = SupervisorPolicy()
    assert policy.step_limit(0.1) == 4.0 and policy.step_limit(3.0) == 30.0
    assert policy.load_limit(None) == 1800 and policy.load_limit(2.0) == 30 and policy.load_limit(60.0) == 600


def test_a_row_of_crashes_ends_with_a_served_request_or_calm() -> None:
    row = CrashRow(SupervisorPolicy(max_crashes=3, calm_seconds=100, delays=(0.0, 1.0)))
    assert [row.add(10), row.add(20)] == [0.0, 1.0]
    row.end()
    assert [row.add(30), row.add(40)] == [0.0, 1.0]
    assert [row.add(200), row.add(290), row.add(300)] == [0.0, 1.0, None]


def test_suspicion_needs_two_crashes_ends_in_time_and_by_an_answer() -> None:
    def made(prompt: list[int], **sampling: float) -> GenerateRequest:
        return GenerateRequest(f"{time.monotonic()}", prompt, SamplingParams(5, **sampling), 0.0)

    suspects = Suspects(SupervisorPolicy(refusal_seconds=600))
    suspects.add([made([1, 2]), made([3])], 0.0)
    suspects.check(made([1, 2]), 1.0)
    suspects.clear(made([3]))
    suspects.add([made([1, 2]), made([1, 2]), made([3])], 100.0)
    with pytest.raises(RequestRefused, match="600 seconds"):
        suspects.check(made([1, 2]), 100.0)
    suspects.check(made([3]), 100.0)
    suspects.check(made([1, 2], temperature=0.5), 100.0)
    suspects.check(made([1, 2]), 701.0)
    assert len({fingerprint(made([1, 2])), fingerprint(made([12])), fingerprint(made([1, 2], top_k=3))}) == 3  # type: ignore[arg-type]
    assert fingerprint(made([1, 2])) == fingerprint(made([1, 2]))
