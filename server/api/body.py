"""Request bodies off the wire."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from server.api.errors import RequestError, from_validation_error
from server.api.schemas import Schema
from server.api.sse import ClientGone

_Schema = TypeVar("_Schema", bound=Schema)

# Objects take a microsecond each, and nothing else runs meanwhile: no body has use for so many. Quoted ones count too, as
# telling them apart would cost as much as reading them.
_LARGE = 200_000  # bytes: of bodies that are read one at a time
_MAX_CONTAINERS = 200_000
_MAX_KEYS = 200_000


async def read_body(request: Request, schema: type[_Schema], max_bytes: int) -> _Schema:
    """The body as `schema`. Raises RequestError: 415, 413, or 400 naming the fields that are wrong."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json" and not (
        content_type.startswith("application/") and content_type.endswith("+json")
    ):
        raise RequestError(
            f"Content-Type must be application/json (got {content_type or 'none'})",
            status=415,
            code="unsupported_media_type",
        )
    declared = request.headers.get("content-length", "")
    too_large = RequestError(f"the request body is larger than {max_bytes} bytes", status=413, code="request_too_large")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise ClientGone from None
    if len(body) < _LARGE:
        return _validated(body, schema)
    _refuse_costly(body)
    async with request.app.state.large_bodies:
        begin = time.monotonic()
        try:
            return _validated(body, schema)
        finally:  # nothing else ran meanwhile: now everything else has as long
            await asyncio.sleep(time.monotonic() - begin)


def _validated(body: bytearray, schema: type[_Schema]) -> _Schema:
    try:
        return schema.model_validate_json(bytes(body))
    except ValidationError as error:
        raise from_validation_error(error) from None


def _refuse_costly(body: bytearray) -> None:
    """Refuse what is within the limit of bytes and would still keep the event loop for seconds."""
    for what, count, most in (
        ("'{' and '['", body.count(b"{") + body.count(b"["), _MAX_CONTAINERS),
        ("':'", body.count(b":"), _MAX_KEYS),
    ):
        if count > most:
            raise RequestError(
                f"the body has {count} of {what}, of which {most} are allowed", status=413, code="request_too_large"
            )
