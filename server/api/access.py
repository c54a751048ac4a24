"""Who may ask, and how often: API keys, and each key's limits. Everything is refused that is not known to be let in."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import RequestError, any_error_response
from server.keys import ApiKey
from server.record import current_record

# Without a key: what probes ask, and the page, whose files are the same for everybody.
_OPEN_PATHS = frozenset({"/live", "/health", "/ready"})
_PAGE_PATH = re.compile(r"/|/static/[^/]+")
_READING = ("GET", "HEAD")

_WINDOW = 60.0  # seconds, of the limit per minute


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Of each key; 0: none."""

    requests_per_minute: int = 0
    concurrent_requests: int = 0


class _Usage:
    """Of one key."""

    def __init__(self, limits: KeyLimits) -> None:
        self.num_running = 0
        self.starts: deque[float] = deque(maxlen=limits.requests_per_minute or 1)


class Access:
    """Middleware: lets in what brings a key, within the key's limits. Without keys everybody is one and the same.

    Limits count requests that ask for work (POST). `on_refused` is told the reason of each that they turn away.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[ApiKey] = (),
        limits: KeyLimits | None = None,
        on_refused: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._keys = tuple(keys)
        self._limits = limits or KeyLimits()
        self._on_refused = on_refused
        self._clock = clock
        self._usage = {name: _Usage(self._limits) for name in ("", *(key.name for key in self._keys))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "RequestIds lets nothing else pass"
        name = ""
        if self._keys and not _is_open(scope):
            key = self._find(_presented(scope))
            if key is None:
                self._on_refused("unauthorized")
                await any_error_response(_unauthorized(scope), scope["path"])(scope, receive, send)
                return
            name = key.name
            record = current_record()
            if record is not None:
                record.key_name = name
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        usage = self._usage[name]
        try:
            self._count(usage)
        except RequestError as error:
            await any_error_response(error, scope["path"])(scope, receive, send)
            return
        usage.num_running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            usage.num_running -= 1

    def _find(self, secret: bytes | None) -> ApiKey | None:
        """The key with this secret. Every key is compared with, so that the time says nothing of which one it was."""
        digest = hashlib.sha256(secret or b"").digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found if secret else None

    def _count(self, usage: _Usage) -> None:
        """Raises RequestError past a limit."""
        limits = self._limits
        if limits.concurrent_requests and usage.num_running >= limits.concurrent_requests:
            self._on_refused("key_concurrent_requests")
            raise RequestError(
                f"this API key has {usage.num_running} requests under way, which is its limit",
                status=429,
                code="concurrency_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        if not limits.requests_per_minute:
            return
        now = self._clock()
        oldest = usage.starts[0] if len(usage.starts) == limits.requests_per_minute else None
        if oldest is not None and now - oldest < _WINDOW:
            self._on_refused("key_requests_per_minute")
            raise RequestError(
                f"this API key has sent {limits.requests_per_minute} requests within a minute, which is its limit",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": str(max(1, round(oldest + _WINDOW - now + 0.5)))},
            )
        usage.starts.append(now)


def _is_open(scope: Scope) -> bool:
    """By the very path that routes are found by."""
    path = scope["path"]
    return path in _OPEN_PATHS or (scope["method"] in _READING and _PAGE_PATH.fullmatch(path) is not None)


def _presented(scope: Scope) -> bytes | None:
    """The secret that a request brings: of a bearer token, or of x-api-key for Anthropic's clients. None: none, or several."""
    bearers = [value for name, value in scope["headers"] if name == b"authorization"]
    plain = [value for name, value in scope["headers"] if name == b"x-api-key"]
    found = [*map(_bearer, bearers), *plain]
    if len(bearers) > 1 or len(plain) > 1 or len(set(found)) != 1:  # a client may send both, if they say the same
        return None
    return found[0]


def _bearer(value: bytes) -> bytes | None:
    scheme, _, token = value.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else None


def _unauthorized(scope: Scope) -> RequestError:
    names = {name for name, _ in scope["headers"]}
    is_wrong = bool(names & {b"authorization", b"x-api-key"})
    return RequestError(
        "the API key is not one of this server's" if is_wrong else "needs an API key: Authorization: Bearer KEY",
        status=401,
        code="invalid_api_key" if is_wrong else "missing_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
