"""One started engine as the API process sees it: messages in and out, what it is at, and its end.

Two threads touch the pipe, so that neither a busy engine nor a full pipe ever blocks the event loop: one reads and decodes, one
writes. All else belongs to the loop.
"""

from __future__ import annotations

import asyncio
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Protocol

from server.engine import codec
from server.engine.board import Board
from server.types import EngineFailure, EngineInfo, EngineInput, EngineOutput, StepOutput

_END_GRACE = 5.0  # seconds that an engine which has failed gets to end by itself
_KILL_GRACE = 5.0  # and that the kernel gets to end one that was killed


class EngineUnavailable(Exception):
    """The engine takes no requests: it is starting, draining or down. The message is fit for users; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineHandle(Protocol):
    """A started engine, process or thread, as its launcher hands it over."""

    @property
    def connection(self) -> Connection: ...

    @property
    def board(self) -> Board: ...

    def is_alive(self) -> bool: ...

    def join(self, seconds: float) -> None: ...

    def kill(self) -> None: ...

    def exit_code(self) -> int | None:
        """None while it runs, and for a thread."""


def end_engine(handle: EngineHandle, patience: float = 0.2) -> None:
    """Waits `patience` seconds for it to end, then kills it and hangs up, which ends a thread that listens. Blocks."""
    handle.join(patience)
    if handle.is_alive():
        handle.kill()
    codec.hang_up(handle.connection)
    handle.join(_KILL_GRACE)


def end_reason(exit_code: int | None) -> str:
    if exit_code is None:
        return "it ended without a word"
    if exit_code < 0:
        number = -exit_code
        known = {item.value: item.name for item in signal.Signals}
        return f"its process was ended by signal {number} ({known.get(number, 'unknown')})"
    return f"its process ended with exit code {exit_code}"


class EngineLink:
    """`on_step` and `on_end` are called on the event loop that makes the link; nothing is after `on_end`."""

    def __init__(
        self,
        handle: EngineHandle,
        epoch: int,
        on_step: Callable[[StepOutput], None],
        on_end: Callable[[EngineLink], None],
    ) -> None:
        self.handle = handle
        self.epoch = epoch
        self.fault: str | None = None  # why it ends, where that is known before it has
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # nobody may be waiting
        self._on_step, self._on_end = on_step, on_end
        self._outbox: queue.SimpleQueue[EngineInput | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._read, f"engine-reader-{epoch}"), (self._write, f"engine-writer-{epoch}"))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_ready(self) -> bool:
        """It has loaded, or ended before."""
        return self.ready.done()

    async def come_up(self) -> EngineInfo:
        """What it says when it is ready. EngineUnavailable where it has ended instead, or right after."""
        info = await asyncio.shield(self.ready)
        if self.ended.is_set():
            raise EngineUnavailable(self.fault or "it ended")
        return info

    def send(self, message: EngineInput) -> None:
        self._outbox.put(message)

    def kill(self, why: str) -> None:
        """Its end is reported as any other."""
        if not self.ended.is_set():
            self.fault = self.fault or why
            self.handle.kill()

    async def close(self, patience: float = 0.2) -> bool:
        """End it and give back its threads and its pipe. False for one that cannot be ended: a thread that hangs."""
        return await asyncio.to_thread(self.close_now, patience)

    def close_now(self, patience: float = 0.2) -> bool:
        """`close` for when no event loop runs."""
        end_engine(self.handle, patience)
        self._outbox.put(None)
        for thread in self._threads:
            thread.join(1.0)
        self.handle.connection.close()
        return not self.handle.is_alive()

    # -- threads -----------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        while True:
            try:
                message: EngineOutput = codec.decode(self.handle.connection.recv_bytes())
            except (EOFError, OSError, ValueError):  # a message cut short by a crash is no message
                break
            if not self._post(self._receive, message):
                return
        self.handle.join(2.0)  # for its exit code
        self._post(self._end)

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self.handle.connection.send_bytes(codec.encode(message))
            except OSError:  # the engine is gone: the reader reports it
                return

    def _post(self, callback: Callable[..., None], *arguments: object) -> bool:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed
            return False
        return True

    # -- on the event loop -------------------------------------------------------------------------------------------------

    def _receive(self, message: EngineOutput) -> None:
        if message.epoch != self.epoch:
            return
        if isinstance(message, StepOutput):
            self._on_step(message)
        elif isinstance(message, EngineInfo):
            if not self.ready.done():
                self.ready.set_result(message)
        elif isinstance(message, EngineFailure):
            self.fault = self.fault or message.error
            self._loop.call_later(_END_GRACE, self.kill, message.error)

    def _end(self) -> None:
        self.fault = self.fault or end_reason(self.handle.exit_code())
        self.ended.set()
        if not self.ready.done():
            self.ready.set_exception(EngineUnavailable(self.fault))
        self._on_end(self)
