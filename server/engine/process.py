"""The engine's process: starts it, feeds it from the pipe, and reports what it did or why it could not.

`spawn_engine` runs in the API process and imports nothing heavy; `engine_main` is what the child runs. One loop serves both
the child and `--in-process` (a thread with a pipe of its own), so that the two differ in nothing but the address space.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol

from server.config import EngineConfig
from server.engine import codec
from server.engine.board import Board
from server.logs import configure_logging
from server.types import (
    AbortReason,
    AbortRequest,
    EngineFailure,
    EngineInfo,
    EngineOutput,
    FinishReason,
    GenerateRequest,
    PoolRequest,
    Shutdown,
    StepOutput,
    TokenEvent,
)

logger = logging.getLogger(__name__)

# Seconds that the loop gets to end by itself once the API process is gone: a step may be under way.
_ORPHAN_GRACE = 5.0
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Engine(Protocol):
    """What the loop needs of an engine. `step` never blocks when there is no work, and reports aborted requests too. It calls
    `on_launch` with the requests that it is about to compute for, and the seconds that this is to take."""

    info: EngineInfo
    on_launch: Callable[[list[str], float], None] | None

    def submit(self, request: GenerateRequest | PoolRequest) -> None: ...

    def abort(self, request_id: str, reason: AbortReason) -> None: ...

    def has_work(self) -> bool: ...

    def step(self) -> StepOutput: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ProcessHandle:
    """An engine in a process of its own, seen from the API process."""

    connection: Connection
    board: Board
    process: BaseProcess

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def join(self, seconds: float) -> None:
        self.process.join(seconds)

    def kill(self) -> None:
        self.process.kill()

    def exit_code(self) -> int | None:
        return self.process.exitcode


@dataclass(frozen=True, slots=True)
class ThreadHandle:
    """An engine in a thread, which cannot be killed and has no exit code."""

    connection: Connection
    board: Board
    thread: threading.Thread

    def is_alive(self) -> bool:
        return self.thread.is_alive()

    def join(self, seconds: float) -> None:
        self.thread.join(seconds)

    def kill(self) -> None:
        return

    def exit_code(self) -> None:
        return None


class _PeerGone:
    """Stands in the inbox for the end of the pipe."""


class EngineLoop:
    """Runs an engine from the messages of a connection until a shutdown, the peer's end, or a failure."""

    def __init__(self, engine: Engine, inbox: queue.SimpleQueue[object], connection: Connection, board: Board) -> None:
        self._engine = engine
        self._board = board
        engine.on_launch = board.write
        self._inbox = inbox
        self._connection = connection
        self._live: set[str] = set()  # submitted and not yet reported finished
        self._refused: list[TokenEvent] = []  # requests that `submit` did not take
        self._stopping = False

    def run(self) -> None:
        """Returns when it is told to stop; an engine's exception passes through."""
        while self._receive():
            self._board.write()
            output = self._engine.step()
            if self._refused:
                output = dataclasses.replace(output, events=[*output.events, *self._refused])
                self._refused = []
            self._live.difference_update(event.request_id for event in output.events if event.finish_reason is not None)
            is_heard = self._send(output)
            self._board.write()
            if not is_heard or (self._stopping and not self._engine.has_work()):
                return

    def _receive(self) -> bool:
        """Take all messages that wait; block for one when the engine is idle, so that an idle server uses no processor."""
        block = not self._engine.has_work() and not self._stopping
        while True:
            try:
                message = self._inbox.get(block=block)
            except queue.Empty:
                return True
            block = False
            if isinstance(message, GenerateRequest | PoolRequest):
                self._submit(message)
            elif isinstance(message, AbortRequest):
                self._engine.abort(message.request_id, message.reason)
            elif isinstance(message, Shutdown):
                self._stopping = True
                if not message.drain:
                    for request_id in self._live:
                        self._engine.abort(request_id, AbortReason.CLIENT)
            elif isinstance(message, _PeerGone):
                return False

    def _submit(self, request: GenerateRequest | PoolRequest) -> None:
        """A ValueError of `submit` ends that request alone."""
        self._board.write((request.request_id,))
        try:
            self._engine.submit(request)
        except ValueError as error:
            self._refused.append(
                TokenEvent(request.request_id, [], finish_reason=FinishReason.ERROR, error=str(error), timings=None)
            )
        else:
            self._live.add(request.request_id)

    def _send(self, output: EngineOutput) -> bool:
        try:
            self._connection.send_bytes(codec.encode(output))
        except OSError:  # the API process is gone
            return False
        return True


def serve_engine(
    build: Callable[[], Engine], connection: Connection, board: Board, epoch: int, *, exit_when_orphaned: bool
) -> bool:
    """Build the engine, say EngineInfo, and run its loop. True for an orderly end; False after an EngineFailure.

    The pipe is read by a thread from the start on: the API process never waits for a step, and its death is seen even
    while the model loads.
    """
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    reader = threading.Thread(
        target=_read_messages, args=(connection, inbox, exit_when_orphaned), name="engine-inbox", daemon=True
    )
    reader.start()
    engine: Engine | None = None
    try:
        engine = build()
        connection.send_bytes(codec.encode(engine.info))
        EngineLoop(engine, inbox, connection, board).run()
        return True
    except (BrokenPipeError, ConnectionResetError):  # the API process left while the model loaded
        return True
    except Exception as error:
        # A ValueError or OSError while building is the user's: a missing file, a model that does not fit. One line says it.
        expected = engine is None and isinstance(error, ValueError | OSError)
        if expected:
            logger.error("the engine cannot start: %s", error)
        else:
            logger.exception("the engine failed")
        _report_failure(connection, epoch, str(error) if expected else f"{type(error).__name__}: {error}")
        return False
    finally:
        if engine is not None:
            engine.close()
        codec.hang_up(connection)
        if not exit_when_orphaned:
            reader.join(1.0)
        connection.close()


def _report_failure(connection: Connection, epoch: int, error: str) -> None:
    try:
        connection.send_bytes(codec.encode(EngineFailure(epoch, error)))
    except OSError:
        logger.warning("the API process is gone: nobody to tell of the failure")


def _read_messages(connection: Connection, inbox: queue.SimpleQueue[object], exit_when_orphaned: bool) -> None:
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            break
        inbox.put(codec.decode(data))
    inbox.put(_PeerGone())
    if exit_when_orphaned:
        time.sleep(_ORPHAN_GRACE)
        os._exit(1)  # a step or a load that does not end must not outlive the server


def engine_main(
    config: EngineConfig,
    connection: Connection,
    board: Board,
    epoch: int,
    log_level: str,
    log_format: str,
) -> None:
    """What the engine process runs. The API process decides when it ends, so signals sent to the whole group are ignored."""
    _end_with_parent()
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    configure_logging(log_level, log_format, "engine")
    is_orderly = serve_engine(lambda: _build(config, epoch), connection, board, epoch, exit_when_orphaned=True)
    logging.shutdown()
    # All that is left is the interpreter taking down torch and gigabytes of cache piece by piece: seconds, for nothing.
    os._exit(0 if is_orderly else 1)


def _end_with_parent() -> None:
    """The kernel kills this process when the API process ends, also while it hangs or is stopped."""
    if sys.platform != "linux":
        return
    import ctypes

    parent = multiprocessing.parent_process()
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0 and parent and os.getppid() != parent.pid:
        os._exit(1)  # it was quicker


def _build(config: EngineConfig, epoch: int) -> Engine:
    from server.engine.engine import build_engine

    return build_engine(config, epoch)


def spawn_engine(config: EngineConfig, epoch: int, log_level: str = "info", log_format: str = "text") -> ProcessHandle:
    """Start the engine in a fresh process; it says EngineInfo or EngineFailure on the pipe when it has loaded."""
    # Threads of torch's own pool that spin at barriers would starve the kernels' threads, and each other when cores are short.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    context = multiprocessing.get_context("spawn")
    board = Board(is_shared=True)
    ours, theirs = context.Pipe()
    process: BaseProcess = context.Process(
        target=engine_main,
        args=(config, theirs, board, epoch, log_level, log_format),
        name=f"awq-serve engine {epoch}",
    )
    try:
        process.start()
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()  # so that the pipe ends when the child does
    return ProcessHandle(ours, board, process)


def thread_engine(build: Callable[[], Engine], epoch: int) -> ThreadHandle:
    """The same loop in a thread of this process (`--in-process`, tests)."""
    board = Board(is_shared=False)
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(
        target=serve_engine,
        args=(build, theirs, board, epoch),
        kwargs={"exit_when_orphaned": False},
        name=f"engine-{epoch}",
        daemon=True,
    )
    thread.start()
    return ThreadHandle(ours, board, thread)


def in_process_engine(config: EngineConfig, epoch: int) -> ThreadHandle:
    """`thread_engine` for the real engine."""
    return thread_engine(lambda: _build(config, epoch), epoch)
