"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from server.engine.client import EngineUnavailable, RequestRefused

_MAX_REPORTED_ERRORS = 10
_MAX_TOLD_APART = 1000  # errors; of more, only their number is told: to list a million takes seconds
_MAX_SHOWN_INPUT = 100  # characters
_MAX_JSON_DEPTH = 200  # the JSON parser's own
_PATH = re.compile(r"(?<![\w/:])(?:~?/|[A-Za-z]:\\)[^\s'\"`,;:()]+")

# Of /v1/messages, by status.
_MESSAGES_PATH = "/v1/messages"
_MESSAGES_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}

# Schemas give the branches of their unions tags with this prefix, so that the paths of errors can leave them out.
BRANCH_PREFIX = "@"


class RequestError(Exception):
    """A request that cannot be served as it is. `param` names the field, `code` is a word that programs can test."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    if status >= 500:  # what went wrong inside may speak of files
        message = _PATH.sub("...", message)
    kind = {429: "rate_limit_error", 503: "service_unavailable"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def messages_error_body(error: RequestError) -> dict[str, Any]:
    """In Anthropic's shape."""
    kind = _MESSAGES_TYPES.get(error.status, "invalid_request_error")
    message = error.message if error.status < 500 else _PATH.sub("...", error.message)
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_response(error: RequestError) -> JSONResponse:
    body = error_body(error.message, error.status, error.param, error.code)
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def any_error_response(error: RequestError, path: str) -> JSONResponse:
    """In the shape that the clients of a path expect."""
    if path == _MESSAGES_PATH or path.startswith(_MESSAGES_PATH + "/"):
        return JSONResponse(messages_error_body(error), status_code=error.status, headers=error.headers)
    return error_response(error)


def unavailable(reason: str, retry_after: int = 5) -> RequestError:
    return RequestError(reason, status=503, code="engine_unavailable", headers={"Retry-After": str(retry_after)})


def from_validation_error(error: ValidationError) -> RequestError:
    """One line per wrong field, each with its path, what is wrong, and the value where it is short."""
    num_errors = error.error_count()
    if num_errors > _MAX_TOLD_APART:
        return RequestError(f"the body has {num_errors} errors, more than the {_MAX_TOLD_APART} that are told apart")
    lines = []
    params = []
    for detail in error.errors(include_url=False)[:_MAX_REPORTED_ERRORS]:
        path = [str(part) for part in detail["loc"] if not str(part).startswith(BRANCH_PREFIX)]
        params.append(".".join(path))
        lines.append(_describe(detail, params[-1]))
    return RequestError("; ".join(dict.fromkeys(lines)), param=params[0] or None, code=None)


def _describe(detail: Any, path: str) -> str:
    if detail["type"] == "json_invalid":
        if "recursion limit" in detail["ctx"]["error"]:
            return f"the body is not valid JSON here: it is nested more than {_MAX_JSON_DEPTH} levels deep"
        return f"the body is not valid JSON: {detail['ctx']['error']}"
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown or unsupported field"
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    line = f"{path}: {message}" if path else f"body: {message}"
    value = detail.get("input")
    if detail["type"] == "missing" or isinstance(value, dict | list):
        return line
    shown = repr(value)
    return f"{line} (got {shown[:_MAX_SHOWN_INPUT]}{'...' if len(shown) > _MAX_SHOWN_INPUT else ''})"


async def on_request_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return any_error_response(error, request.url.path)


async def on_unavailable(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EngineUnavailable)
    return any_error_response(unavailable(str(error), error.retry_after), request.url.path)


async def on_refused(request: Request, error: Exception) -> JSONResponse:
    return any_error_response(RequestError(str(error), code="refused_fingerprint"), request.url.path)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """What the router answers by itself: unknown routes and methods."""
    assert isinstance(error, HTTPException)
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"unknown route: {request.method} {request.url.path}", "unknown_url"
    elif error.status_code == 405:
        message, code = f"{request.method} is not allowed for {request.url.path}", "method_not_allowed"
    told = RequestError(message, status=error.status_code, code=code, headers=dict(error.headers or {}))
    return any_error_response(told, request.url.path)


async def on_exception(request: Request, error: Exception) -> JSONResponse:
    """A fault of ours: the traceback goes to the log, nothing of it to the client."""
    return any_error_response(RequestError("internal error", status=500, code="internal_error"), request.url.path)


HANDLERS: dict[Any, Any] = {
    RequestError: on_request_error,
    EngineUnavailable: on_unavailable,
    RequestRefused: on_refused,
    HTTPException: on_http_error,
    Exception: on_exception,
}
