"""Request bodies off the wire."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from server.api.errors import RequestError, from_validation_error
from server.api.schemas import Schema
from server.api.sse import ClientGone

_Schema = TypeVar("_Schema", bound=Schema)


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
    try:
        return schema.model_validate_json(bytes(body))
    except ValidationError as error:
        raise from_validation_error(error) from None
