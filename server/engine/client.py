"""The API process's side of the engine: requests go in, each request's events come out in its mailbox, and an engine that dies or
hangs is started anew.

All methods belong to one event loop. What happens to requests in a crash is in `server.engine.requests`, when an engine counts as
hung and when restarting is given up in `server.engine.supervisor`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

from server.engine.link import EngineHandle, EngineLink, EngineUnavailable, end_engine
from server.engine.observer import EngineObserver, NoObserver
from server.engine.requests import Held, Mailbox, RequestTable, Triage
from server.engine.supervisor import CrashRow, RequestRefused, SupervisorPolicy, Suspects
from server.engine.watchdog import Watchdog
from server.types import (
    AbortReason,
    AbortRequest,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    PoolRequest,
    Shutdown,
    StepOutput,
    TokenEvent,
)

__all__ = ["EngineClient", "EngineState", "EngineUnavailable", "Mailbox", "RequestRefused"]

logger = logging.getLogger(__name__)

_LOST = "the engine stopped before the request was finished"
_LOST_TWICE = "the engine crashed while it computed this request, and again when it was retried"
_SERVED = (FinishReason.STOP, FinishReason.LENGTH)

Launcher = Callable[[int], EngineHandle]


class EngineState(str, Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # after a crash
    RELOADING = "reloading"  # on demand
    DRAINING = "draining"  # running requests go on; new ones are refused
    DEAD = "dead"  # for good


class EngineClient:
    """Submits requests to one engine at a time and routes its events. `launch(epoch)` starts an engine."""

    def __init__(self, launch: Launcher, policy: SupervisorPolicy | None = None) -> None:
        self._launch = launch
        policy = policy or SupervisorPolicy()
        self.observer: EngineObserver = NoObserver()  # set by the composition root once EngineInfo is known
        self._epoch = 0
        self._state = EngineState.STARTING
        self._refuses_new = False
        self._is_stopping = False
        self._failure = "the engine has not started"
        self._handle: EngineHandle | None = None  # launched, and no link yet
        self._link: EngineLink | None = None
        self._requests = RequestTable()
        self._row = CrashRow(policy)
        self._suspects = Suspects(policy)
        self._watchdog = Watchdog(policy, lambda: self._link, self._on_stuck)
        self._watching: asyncio.Task[None] | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.died = asyncio.Event()  # the engine is down for good, and nobody asked for that
        self.info: EngineInfo | None = None

    @property
    def state(self) -> EngineState:
        if self._refuses_new and self._state is not EngineState.DEAD:
            return EngineState.DRAINING
        return self._state

    @property
    def failure(self) -> str:
        """Why the engine is down, or was last."""
        return self._failure

    @property
    def retry_after(self) -> int:
        """Seconds after which an engine that is not there now should be."""
        return max(1, math.ceil(self._watchdog.first_load or 5.0))

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    # -- requests ----------------------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest | PoolRequest, mailbox: Mailbox) -> None:
        """Send a request; its events arrive in `mailbox`, the last with a finish reason, whatever happens to the engine.

        Raises EngineUnavailable, and RequestRefused for one that was running in several crashes.
        """
        if self.state is not EngineState.READY or self._link is None:
            raise self._unavailable()
        try:
            self._suspects.check(request, time.monotonic())
        except RequestRefused:
            self.observer.on_refused()
            raise
        self._requests.add(request, mailbox)
        self._note_work()
        self.observer.on_submit(request)
        self._link.send(request)

    def abort(self, request_id: str, reason: AbortReason) -> None:
        """End a request early. No event of it arrives after this; a request that has finished is left alone."""
        if self._requests.silence(request_id, reason.finish_reason) and self._link is not None:
            self._link.send(AbortRequest(request_id, reason))

    def _note_work(self) -> None:
        is_idle = not len(self._requests)
        (self._idle.set if is_idle else self._idle.clear)()
        (self._watchdog.busy.clear if is_idle else self._watchdog.busy.set)()

    # -- life --------------------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the engine without waiting for it, before an event loop runs: it loads while the caller prepares the rest."""
        if self._handle is None and self._link is None:
            self._handle = self._launch(self._epoch)

    async def start(self) -> EngineInfo:
        """Wait until the engine is ready. Raises EngineUnavailable with its reason when it cannot start."""
        self.launch()
        begin = time.monotonic()
        self._watching = asyncio.ensure_future(self._watchdog.run())
        self._watchdog.busy.set()
        assert self._handle is not None
        self._link, self._handle = self._linked(self._handle), None
        try:
            self.info = await self._link.come_up()
        except EngineUnavailable as error:
            self._failure, self._state = str(error), EngineState.DEAD
            raise
        self._watchdog.first_load = time.monotonic() - begin
        self._state = EngineState.READY
        self._note_work()
        return self.info

    def refuse_new(self) -> None:
        """From now on `submit` raises; what runs goes on, on another engine if this one crashes."""
        self._refuses_new = True

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the running ones. False when some were still running after `timeout` seconds."""
        self.refuse_new()
        return await self._wait_idle(timeout)

    async def reload(self, launch: Launcher, timeout: float) -> EngineInfo:
        """Another engine in place of this one. Running requests get `timeout` seconds and are then cut short; new ones are
        refused until the other is ready. Raises EngineUnavailable where it does not come up: then the former launcher's is
        started again, and failing that, restarts go on as after a crash.
        """
        if self._state is not EngineState.READY or self._refuses_new:
            raise self._unavailable()
        self._state = EngineState.RELOADING
        await self._wait_idle(timeout)
        if len(self._requests):
            logger.warning("reloading: %d requests are cut short", len(self._requests))
        await self._shut_down(5.0)
        self._end_all(_LOST)
        former, self._launch = self._launch, launch
        try:
            await self._start_next()
        except EngineUnavailable:
            if self._is_stopping:
                raise
            self._launch = former
            self._state = EngineState.RESTARTING
            self._recovery = asyncio.ensure_future(self._recover())
            raise
        return self._become_ready(is_restart=False)

    async def stop(self, timeout: float = 5.0) -> None:
        """End the engine: unfinished requests end with FinishReason.ABORT; killed when it has not ended in `timeout`."""
        self.refuse_new()
        self._is_stopping = True
        for task in (self._recovery, self._watching):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._shut_down(timeout)
        self._end_all(_LOST)
        self._state = EngineState.DEAD
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """`stop` for when no event loop runs (again): nobody is told anything, the engine just ends."""
        handle, self._handle = self._handle, None
        link, self._link = self._link, None
        if handle is not None:
            end_engine(handle)
            handle.connection.close()
        if link is not None:
            link.close_now()

    async def _wait_idle(self, timeout: float) -> bool:
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def _shut_down(self, timeout: float) -> None:
        """Ask the engine to end, and see to it that it does."""
        link = self._link
        if link is None:
            return
        patience = 0.0
        if link.is_ready and not link.ended.is_set():  # one that still loads does not listen
            link.send(Shutdown(drain=False))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.ended.wait(), timeout)
            patience = 0.2
        self._link = None
        await link.close(patience)

    def _linked(self, handle: EngineHandle) -> EngineLink:
        return EngineLink(handle, self._epoch, self._on_step, self._on_end)

    async def _start_next(self) -> None:
        """The next epoch's engine, when it is ready. EngineUnavailable when it does not come up; then it is gone."""
        self._epoch += 1
        handle: EngineHandle | None = None
        try:
            handle = self._launch(self._epoch)
            self._link = link = self._linked(handle)
        except (OSError, RuntimeError) as error:  # no memory, descriptors, process or thread to be had
            if handle is not None:
                end_engine(handle, 0.0)
            raise EngineUnavailable(f"it cannot be started: {error}") from error
        self._watchdog.busy.set()  # a load is watched too
        try:
            self.info = await link.come_up()
        except BaseException:
            self._link = None
            link.handle.kill()
            await asyncio.shield(link.close())
            raise

    def _become_ready(self, is_restart: bool) -> EngineInfo:
        assert self.info is not None
        self._state = EngineState.READY
        self._note_work()
        self.observer.on_start(self.info, is_restart)
        return self.info

    def _unavailable(self) -> EngineUnavailable:
        why = {
            EngineState.DRAINING: "the server is shutting down and takes no new requests",
            EngineState.STARTING: "the model is loading",
            EngineState.RELOADING: "the model is being loaded anew",
            EngineState.RESTARTING: "the engine has crashed and is starting anew",
        }.get(self.state, "the engine is down")
        return EngineUnavailable(why, self.retry_after)

    # -- the engine's events -----------------------------------------------------------------------------------------------

    def _on_step(self, output: StepOutput) -> None:
        for held, reason in self._requests.take_in(output):
            if reason in _SERVED:
                self._suspects.clear(held.request)
                self._row.end()
        self._note_work()
        self.observer.on_step(output)

    def _on_end(self, link: EngineLink) -> None:
        """The pipe has ended: expected while stopping, the engine's death else."""
        if link is not self._link or self._is_stopping:
            return
        if self._state is EngineState.RELOADING:
            self._end_all(_LOST)
        if self._state is not EngineState.READY:
            return  # whoever starts it sees to that
        self._failure = link.fault or "it ended"
        self._state = EngineState.RESTARTING
        triage = self._requests.triage(link.handle.board.read().request_ids)
        self._suspects.add(triage.running, time.monotonic())
        logger.error(
            "the engine is down: %s; of its requests %d are retried, %d wait on, %d end with an error",
            self._failure, len(triage.retried), len(triage.waiting), len(triage.failed),
        )  # fmt: skip
        self._tell(triage)
        self._recovery = asyncio.ensure_future(self._recover())

    def _tell(self, triage: Triage) -> None:
        for held in triage.failed:
            self._fail(held, _LOST_TWICE if held.num_crashes > 1 and not held.has_output else _LOST)
        self._note_lost(triage.failed)
        self._note_lost(triage.aborted)
        self.observer.on_crash(len(triage.retried))

    def _note_lost(self, lost: list[Held]) -> None:
        """These ended without the engine, with an error where anybody listened."""
        for held in lost:
            self.observer.on_lost([held.request.request_id], held.abort_reason or FinishReason.ERROR)
        self._note_work()

    async def _recover(self) -> None:
        try:
            await self._start_until_up()
        except Exception as error:  # a fault of ours must not leave everybody waiting
            logger.exception("the engine cannot be started anew")
            self._die(f"{type(error).__name__}: {error}")

    async def _start_until_up(self) -> None:
        """Starts engines until one comes up, or too many have not."""
        begin = time.monotonic()
        while True:
            link, self._link = self._link, None
            if link is not None and not await link.close():
                return self._die(f"{self._failure}; and it cannot be ended")
            delay = self._row.add(time.monotonic())
            if delay is None:
                return self._die(f"{self._row.num_crashes} crashes in a row, with no request served: {self._failure}")
            await asyncio.sleep(delay)
            try:
                await self._start_next()
                break
            except EngineUnavailable as error:
                self._failure = str(error)
                logger.error("the engine does not come up: %s", error)
        self._resubmit()
        self._become_ready(is_restart=True)
        logger.warning("the engine is up again after %.1f s", time.monotonic() - begin)

    def _resubmit(self) -> None:
        """What waits for an engine gets the new one, those that are retried first."""
        assert self._link is not None
        assert self.info is not None
        room = self.info.max_model_len  # may be less than the last engine's, if there is less memory
        too_long = self._requests.drop(lambda held: len(held.request.prompt_token_ids) >= room)
        for held in too_long:
            self._fail(held, _LOST)
        self._note_lost([*self._requests.drop(lambda held: held.mailbox is None), *too_long])
        retried = self._requests.on_trial
        for held in self._requests:
            if held.request.request_id in retried:
                self._link.send(replace(held.request, alone=True))
        for held in self._requests:
            if held.request.request_id not in retried:
                self._link.send(held.request)

    def _on_stuck(self, reason: str) -> None:
        """The engine hangs and cannot be ended: there is no place for another."""
        if self._state is not EngineState.DEAD:
            self._die(f"{reason}; and it cannot be ended")

    def _die(self, reason: str) -> None:
        self._failure = reason
        self._state = EngineState.DEAD
        self._end_all(_LOST)
        self.died.set()
        logger.error("the engine is down for good: %s", reason)

    def _end_all(self, error: str) -> None:
        """Answer everything that waits: nothing more will come."""
        ended = self._requests.take_all()
        for held in ended:
            self._fail(held, error)
        self._note_lost(ended)

    @staticmethod
    def _fail(held: Held, error: str) -> None:
        held.deliver(TokenEvent(held.request.request_id, [], finish_reason=FinishReason.ERROR, error=error))
