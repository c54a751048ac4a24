"""What is known of one HTTP request: filled in on its way, read at its end by the access log, metrics and traces."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

from server.types import RequestTimings

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Generated:
    """What a request asked of the model, and what it got."""

    operation: str  # as OpenTelemetry's conventions name it: chat, text_completion, embeddings
    response_id: str
    model: str
    parameters: dict[str, float | int | str] = field(default_factory=dict)  # by gen_ai.request.*'s names
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    finish_reasons: tuple[str, ...] = ()
    timings: tuple[RequestTimings, ...] = ()  # of the sequences that got to their first token


@dataclass(slots=True)
class RequestRecord:
    """Times in seconds: `start` of the monotonic clock, `start_time` of Unix time."""

    request_id: str
    method: str
    path: str  # as it came, percent-encoded: fit for a line of a log
    client: str
    traceparent: dict[str, str] = field(default_factory=dict)  # W3C trace context headers
    start: float = field(default_factory=time.monotonic)
    start_time: float = field(default_factory=time.time)
    route: str | None = None  # None: no route took it
    key_name: str | None = None
    status: int = 0  # 0: nothing was answered
    seconds: float = 0.0
    generated: Callable[[], Generated] | None = None  # what to ask at the end


Recorder = Callable[[RequestRecord], None]
"""Told of every HTTP request once it has ended. Must be quick."""

_CURRENT: ContextVar[RequestRecord | None] = ContextVar("awq_serve_request", default=None)


def current_record() -> RequestRecord | None:
    """The request that this task works for."""
    return _CURRENT.get()


def current_key() -> str:
    """The name of the API key that it came with; empty where there are none."""
    record = _CURRENT.get()
    return "" if record is None else record.key_name or ""


def set_current(record: RequestRecord) -> None:
    _CURRENT.set(record)


def note_generated(generated: Callable[[], Generated]) -> None:
    record = _CURRENT.get()
    if record is not None:
        record.generated = generated


def finish_record(record: RequestRecord, recorders: Iterable[Recorder]) -> None:
    record.seconds = time.monotonic() - record.start
    for tell in recorders:
        try:
            tell(record)
        except Exception:  # the request itself has gone well
            logger.exception("a request could not be recorded")
