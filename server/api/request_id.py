"""X-Request-Id on every response: the client's where it sent one, else one of ours. It is in the log of what fails, too."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import RequestError, error_response

logger = logging.getLogger(__name__)

_NAME = b"x-request-id"
_VALID = re.compile(rb"[!-~]{1,128}")  # printable ASCII without spaces: safe in headers and logs


class RequestIds:
    """Wraps the whole application, its error handlers included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == _NAME]
        is_valid = len(given) <= 1 and all(_VALID.fullmatch(value) for value in given)
        request_id = given[0] if given and is_valid else uuid.uuid4().hex.encode()
        headers = [(_NAME, request_id)]
        if scope["path"].startswith("/v1/messages"):
            headers.append((b"request-id", request_id))  # Anthropic's name of it

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        if not is_valid:
            error = RequestError(
                "X-Request-Id: must be one value of 1 to 128 printable ASCII characters without spaces",
                param="X-Request-Id",
            )
            await error_response(error)(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # it is answered, and goes on to the HTTP server, which logs its traceback
            logger.error("%s %s failed (X-Request-Id %s)", scope["method"], scope["path"], request_id.decode())
            raise
