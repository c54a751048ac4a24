"""X-Request-Id on every response: the client's where it sent one, else one of ours. Around it, the record of the request."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import RequestError, error_response
from server.record import Recorder, RequestRecord, finish_record, set_current

logger = logging.getLogger(__name__)

_NAME = b"x-request-id"
_VALID = re.compile(rb"[!-~]{1,128}")  # printable ASCII without spaces: safe in headers and logs
_TRACE_HEADERS = {b"traceparent", b"tracestate"}
_MAX_PATH = 200  # characters of a path in the log


class RequestIds:
    """Wraps the whole application, its error handlers included. `recorders` are told of every request at its end."""

    def __init__(self, app: ASGIApp, recorders: Sequence[Recorder] = ()) -> None:
        self._app = app
        self._recorders = tuple(recorders)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none: nothing behind this answers, or lets anybody in
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == _NAME]
        is_valid = len(given) <= 1 and all(_VALID.fullmatch(value) for value in given)
        request_id = given[0] if given and is_valid else uuid.uuid4().hex.encode()
        headers = [(_NAME, request_id)]
        if scope["path"].startswith("/v1/messages"):
            headers.append((b"request-id", request_id))  # Anthropic's name of it
        record = _record(scope, request_id.decode())
        set_current(record)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        try:
            if not is_valid:
                error = RequestError(
                    "X-Request-Id: must be one value of 1 to 128 printable ASCII characters without spaces",
                    param="X-Request-Id",
                )
                await error_response(error)(scope, receive, send_with_id)
                return
            await self._app(scope, receive, send_with_id)
        except Exception:  # it is answered, and goes on to the HTTP server, which logs its traceback
            logger.error("%s %s failed (X-Request-Id %s)", record.method, record.path, record.request_id)
            raise
        finally:
            finish_record(record, self._recorders)


def _record(scope: Scope, request_id: str) -> RequestRecord:
    raw_path = scope.get("raw_path") or b""
    path = raw_path.split(b"?")[0].decode("latin-1")[:_MAX_PATH]  # some servers leave the query on
    client = scope.get("client")
    return RequestRecord(
        request_id,
        scope["method"],
        path,
        client[0] if client else "-",
        {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _TRACE_HEADERS},
    )
