"""uvicorn's HTTP/1.1 protocol with what it lacks: deadlines, and bounds on heads, bodies, connections and slow readers.

Every connection is in one of four states: between requests, in a request's head, in its body, or waiting for its answer. All but
the last end at an absolute time, however the bytes trickle; the last is the engine's affair, unless the client takes nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEADERS = 128  # of one request
MAX_PIPELINED = 16  # requests that wait behind another one of their connection
_LEAST_SENT = 4096  # bytes that a client must take within the send timeout, where so many wait


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Times in seconds, sizes in bytes."""

    max_header_bytes: int
    max_body_bytes: int
    max_connections: int
    header_timeout: float
    body_timeout: float
    send_timeout: float


class Guard:
    """What the connections of one server share. `on_refused` is told the reason of each one that is cut."""

    def __init__(self, limits: HttpLimits, on_refused: Callable[[str], None] = lambda reason: None) -> None:
        self.limits = limits
        self.on_refused = on_refused
        self.num_connections = 0
        self.idle: OrderedDict[GuardedProtocol, None] = OrderedDict()  # that wait for a request, the longest first

    def make_room(self) -> bool:
        """Whether one more connection may open. The one that has been idle for longest gives way."""
        if self.num_connections < self.limits.max_connections:
            return True
        if not self.idle:
            return False
        oldest = next(iter(self.idle))
        oldest.cut("evicted")
        return True


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    guard: Guard  # of the subclass that `guarded_protocol` makes

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_counted = False
        self._is_cut = False
        self._in_head = False  # a request has begun, and its head is not whole
        self._in_body = False
        self._head_bytes = 0
        self._body_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._send_check: asyncio.TimerHandle | None = None
        self._num_waiting = 0  # bytes to send, when the send check was set

    # -- the connection ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self.guard.make_room():
            self._refuse(503, "the server has no room for another connection", "too_many_connections")
            return
        self._is_counted = True
        self.guard.num_connections += 1
        self._begin_wait(self.guard.limits.header_timeout, self._on_header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        self.guard.idle.pop(self, None)
        if self._send_check is not None:
            self._send_check.cancel()
            self._send_check = None
        if self._is_counted:
            self._is_counted = False
            self.guard.num_connections -= 1
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        super().connection_lost(exc)

    def cut(self, reason: str) -> None:
        """End the connection without a word."""
        self.guard.on_refused(reason)
        self._is_cut = True
        self._end_wait()
        self.guard.idle.pop(self, None)
        self.transport.abort()

    def _refuse(self, status: int, message: str, reason: str) -> None:
        """Answer and end the connection. Where another answer is under way, it just ends."""
        if self._is_cut or self.transport.is_closing():
            return
        self.guard.on_refused(reason)
        self._is_cut = True
        self._end_wait()
        self.guard.idle.pop(self, None)
        cycle = self.cycle
        if self._is_answering():  # an earlier request: whatever is written now would be taken for its answer
            self.transport.abort()
            return
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:
                self.transport.abort()
                return
            cycle.disconnected = True  # what the application may still say is not sent
            cycle.message_event.set()
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": reason}
        body = json.dumps({"error": error}).encode()
        headers = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + headers + body)
        self.transport.close()

    # -- deadlines -----------------------------------------------------------------------------------------------------

    def _begin_wait(self, seconds: float, on_timeout: Callable[[], None]) -> None:
        self._end_wait()
        self._deadline = self.loop.call_later(seconds, on_timeout)
        if self._is_counted and not self._is_answering():
            self.guard.idle[self] = None

    def _end_wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _is_answering(self) -> bool:
        """Whether an earlier request of this connection is being answered: what comes behind it is not read meanwhile."""
        is_current = self._in_body and not self.pipeline
        return self.cycle is not None and not self.cycle.response_complete and not is_current

    def _on_header_timeout(self) -> None:
        if self._is_answering():
            self._begin_wait(self.guard.limits.header_timeout, self._on_header_timeout)
        elif self._in_head:
            self._refuse(408, "the request's head did not come in time", "header_timeout")
        else:
            self.cut("idle_timeout")

    def _on_body_timeout(self) -> None:
        if self._is_answering():
            self._begin_wait(self.guard.limits.body_timeout, self._on_body_timeout)
        elif self.cycle.response_complete:  # refused already, and the client goes on sending
            self.cut("body_timeout")
        else:
            self._refuse(408, "the request's body did not come in time", "body_timeout")

    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    # -- reading -------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._is_cut:
            return
        self._unset_keepalive_if_required()
        if self._deadline is None and not self._in_body:  # between two requests: whatever this is, a head must follow
            self._begin_wait(self.guard.limits.header_timeout, self._on_header_timeout)
        if not self._in_body:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # not taken: the request is answered as it is, and is the last one
            if self.cycle is not None:
                self.cycle.keep_alive = False
        except httptools.HttpParserError:
            self._refuse(400, "not a valid HTTP request", "bad_request")
            return
        if self._in_head or (self._deadline is not None and not self._in_body):
            if self._head_bytes > self.guard.limits.max_header_bytes:
                self._refuse_head(f"is larger than {self.guard.limits.max_header_bytes} bytes")
        else:
            self._head_bytes = 0

    def on_message_begin(self) -> None:
        if self._is_cut:
            return
        super().on_message_begin()
        self._in_head = True
        self._body_bytes = 0
        if self._deadline is None:
            self._begin_wait(self.guard.limits.header_timeout, self._on_header_timeout)

    def on_url(self, url: bytes) -> None:
        if not self._is_cut:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_cut:
            return
        if self._in_body:  # a trailer: no part of the request that is being answered
            self._count_body(len(name) + len(value))
        elif len(self.headers) >= MAX_HEADERS:
            self._refuse_head(f"has more than {MAX_HEADERS} headers")
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_cut:
            return
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.guard.limits.max_header_bytes:
            self._refuse_head(f"is larger than {self.guard.limits.max_header_bytes} bytes")
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse(400, f"more than {MAX_PIPELINED} requests wait on this connection", "bad_request")
            return
        self._in_head = False
        self._in_body = True
        super().on_headers_complete()
        self._begin_wait(self.guard.limits.body_timeout, self._on_body_timeout)

    def _refuse_head(self, what: str) -> None:
        self._refuse(431, f"the request's head {what}", "header_limit")

    def on_body(self, body: bytes) -> None:
        if not self._is_cut and self._count_body(len(body)):
            super().on_body(body)

    def _count_body(self, num_bytes: int) -> bool:
        """False where this is beyond all patience: the application refuses bodies half as large."""
        self._body_bytes += num_bytes
        if self._body_bytes > 2 * self.guard.limits.max_body_bytes + 2**16:
            self.cut("body_limit")
        return not self._is_cut

    def on_message_complete(self) -> None:
        if self._is_cut:
            return
        self._in_body = False
        self._head_bytes = 0
        self._end_wait()
        self.guard.idle.pop(self, None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_counted and self.timeout_keep_alive_task is not None and not self.transport.is_closing():
            self.guard.idle[self] = None

    # -- writing -------------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._send_check is None:
            self._num_waiting = self.transport.get_write_buffer_size()
            self._send_check = self.loop.call_later(self.guard.limits.send_timeout, self._on_send_check)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_check is not None:
            self._send_check.cancel()
            self._send_check = None

    def _on_send_check(self) -> None:
        """While writing is paused nothing is added: what waits shrinks as the client takes it."""
        self._send_check = None
        waiting = self.transport.get_write_buffer_size()
        if self._num_waiting - waiting < _LEAST_SENT:
            self.cut("send_timeout")
            return
        self._num_waiting = waiting
        self._send_check = self.loop.call_later(self.guard.limits.send_timeout, self._on_send_check)


def guarded_protocol(guard: Guard) -> type[asyncio.Protocol]:
    """The class for uvicorn's `http` of a server whose connections share `guard`."""
    return type("GuardedProtocol", (GuardedProtocol,), {"guard": guard})
