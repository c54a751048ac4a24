"""The API process's side of the engine: requests go in, each request's events come out in its mailbox.

All methods belong to one event loop. Two threads touch the pipe, so that neither a busy engine nor a full pipe ever blocks
the loop: one reads and decodes, one writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterable
from enum import Enum
from multiprocessing.connection import Connection
from typing import Protocol

from server.engine import codec
from server.types import (
    AbortReason,
    AbortRequest,
    EngineFailure,
    EngineInfo,
    EngineInput,
    EngineOutput,
    FinishReason,
    GenerateRequest,
    PoolRequest,
    Shutdown,
    StepOutput,
    TokenEvent,
)

logger = logging.getLogger(__name__)


class EngineState(str, Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # running requests go on; new ones are refused
    DEAD = "dead"


class EngineUnavailable(Exception):
    """The engine takes no requests: it is starting, draining or dead. The message is fit for users."""


class EngineObserver(Protocol):
    """Told of what passes, for metrics. Called on the event loop; must be quick."""

    def on_submit(self, request: GenerateRequest | PoolRequest) -> None: ...

    def on_step(self, output: StepOutput) -> None: ...

    def on_lost(self, request_ids: Iterable[str]) -> None: ...


class EngineHandle(Protocol):
    """A started engine, process or thread, as its launcher hands it over."""

    @property
    def connection(self) -> Connection: ...

    def join(self, seconds: float) -> None: ...

    def kill(self) -> None: ...

    def exit_code(self) -> int | None:
        """None while it runs, and for a thread."""


class Mailbox:
    """The events of one or more requests, in order. One reader."""

    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> list[TokenEvent]:
        """All events that wait, at least one: a reader that falls behind gets several steps at once."""
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        return events


class EngineClient:
    """Submits requests to one engine and routes its events.

    `launch(epoch)` starts an engine. Messages of another epoch than the current one are dropped.
    """

    def __init__(self, launch: Callable[[int], EngineHandle]) -> None:
        self._launch = launch
        self.observer: EngineObserver | None = None  # set by the composition root once EngineInfo is known
        self._epoch = 0
        self._state = EngineState.STARTING
        self._failure = "the engine has not started"
        self._handle: EngineHandle | None = None
        self._outbox: queue.SimpleQueue[EngineInput | None] = queue.SimpleQueue()
        self._mailboxes: dict[str, Mailbox] = {}  # requests that someone listens to
        self._unfinished: set[str] = set()  # requests that the engine still holds, aborted ones included
        self._threads: list[threading.Thread] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._ended = asyncio.Event()
        self._started: asyncio.Future[EngineInfo] | None = None
        self.info: EngineInfo | None = None

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def launch(self) -> None:
        """Start the engine without waiting for it, before an event loop runs: it loads while the caller prepares the rest."""
        if self._handle is None:
            self._handle = self._launch(self._epoch)

    async def start(self) -> EngineInfo:
        """Wait until the engine is ready. Raises EngineUnavailable with its reason when it cannot start."""
        self.launch()
        assert self._handle is not None
        loop = asyncio.get_running_loop()
        self._started = loop.create_future()
        for target, name in ((self._read, "engine-reader"), (self._write, "engine-writer")):
            thread = threading.Thread(target=target, args=(loop, self._handle), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        self.info = await self._started
        return self.info

    def submit(self, request: GenerateRequest | PoolRequest, mailbox: Mailbox) -> None:
        """Send a request; its events arrive in `mailbox`, the last with a finish reason, whatever happens to the engine."""
        if self._state is not EngineState.READY:
            raise EngineUnavailable(self._why_unavailable())
        assert request.request_id not in self._unfinished, f"request id {request.request_id} is in use"
        self._mailboxes[request.request_id] = mailbox
        self._unfinished.add(request.request_id)
        self._idle.clear()
        if self.observer is not None:
            self.observer.on_submit(request)
        self._outbox.put(request)

    def abort(self, request_id: str, reason: AbortReason) -> None:
        """End a request early. No event of it arrives after this; a request that has finished is left alone."""
        if self._mailboxes.pop(request_id, None) is not None and self._state is not EngineState.DEAD:
            self._outbox.put(AbortRequest(request_id, reason))

    def refuse_new(self) -> None:
        """From now on `submit` raises; what runs goes on."""
        if self._state in (EngineState.STARTING, EngineState.READY):
            self._state = EngineState.DRAINING

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the running ones. False when some were still running after `timeout` seconds."""
        self.refuse_new()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def stop(self, timeout: float = 5.0) -> None:
        """End the engine: unfinished requests end with FinishReason.ABORT; killed when it has not ended in `timeout`."""
        self.refuse_new()
        if self._handle is None:
            return
        self._outbox.put(Shutdown(drain=False))
        self._outbox.put(None)
        if self.info is not None:  # one that still loads does not listen
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), timeout)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """`stop` for when no event loop runs (again): nobody is told anything, the engine just ends."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        if handle.exit_code() is None:
            # One that has ended by itself needs a moment to go; one that loads would not hear of it for long.
            handle.join(5.0 if self._state is EngineState.DEAD else 0.2)
        if handle.exit_code() is None:
            handle.kill()
            handle.join(2.0)
        codec.hang_up(handle.connection)
        for thread in self._threads:
            thread.join(1.0)
        handle.connection.close()

    def _why_unavailable(self) -> str:
        if self._state is EngineState.DRAINING:
            return "the server is shutting down and takes no new requests"
        if self._state is EngineState.STARTING:
            return "the model is loading"
        return f"the engine is down: {self._failure}"

    # -- threads -----------------------------------------------------------------------------------------------------------

    def _read(self, loop: asyncio.AbstractEventLoop, handle: EngineHandle) -> None:
        epoch = self._epoch
        while True:
            try:
                message: EngineOutput = codec.decode(handle.connection.recv_bytes())
            except (EOFError, OSError):
                break
            if message.epoch == epoch and not self._post(loop, self._receive, message):
                return
        handle.join(2.0)  # for its exit code
        self._post(loop, self._on_end, handle.exit_code())

    def _write(self, loop: asyncio.AbstractEventLoop, handle: EngineHandle) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                handle.connection.send_bytes(codec.encode(message))
            except OSError:  # the engine is gone: the reader reports it
                return

    @staticmethod
    def _post(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object) -> bool:
        try:
            loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed
            return False
        return True

    # -- on the event loop -------------------------------------------------------------------------------------------------

    def _receive(self, message: EngineOutput) -> None:
        if isinstance(message, StepOutput):
            self._on_step(message)
        elif isinstance(message, EngineInfo):
            if self._state is EngineState.STARTING:
                self._state = EngineState.READY
            if self._started is not None and not self._started.done():
                self._started.set_result(message)
        else:
            self._on_failure(message)

    def _on_step(self, output: StepOutput) -> None:
        for event in output.events:
            if event.finish_reason is None:
                mailbox = self._mailboxes.get(event.request_id)
            else:
                mailbox = self._mailboxes.pop(event.request_id, None)
                self._unfinished.discard(event.request_id)
            if mailbox is not None:
                mailbox.put(event)
        if not self._unfinished:
            self._idle.set()
        if self.observer is not None:
            self.observer.on_step(output)

    def _on_failure(self, failure: EngineFailure) -> None:
        self._failure = failure.error
        self._state = EngineState.DEAD
        self._end_all()

    def _on_end(self, exit_code: int | None) -> None:
        """The pipe has ended: expected while stopping, the engine's death else."""
        self._ended.set()
        if self._state is not EngineState.DEAD:
            unexpected = self._state is not EngineState.DRAINING or self._unfinished
            self._failure = f"its process ended with exit code {exit_code}"
            if unexpected:
                logger.error("the engine is down: %s", self._failure)
            self._state = EngineState.DEAD
        self._end_all()

    def _end_all(self) -> None:
        """Answer everything that waits: nothing more will come."""
        if self._started is not None and not self._started.done():
            self._started.set_exception(EngineUnavailable(self._failure))
        lost, self._unfinished = self._unfinished, set()
        mailboxes, self._mailboxes = self._mailboxes, {}
        for request_id, mailbox in mailboxes.items():
            error = "the engine stopped before the request was finished"
            mailbox.put(TokenEvent(request_id, [], finish_reason=FinishReason.ERROR, error=error))
        self._idle.set()
        if lost and self.observer is not None:
            self.observer.on_lost(lost)
