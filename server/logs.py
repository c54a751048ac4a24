"""The log: lines of text, or one JSON object a line. Both processes write the same; prompts reach it only where asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from server.record import RequestRecord

_NOISY = ("httpx", "httpcore", "filelock", "urllib3", "opentelemetry")
# What every record has; whatever else one has was given with `extra`, and belongs in the JSON.
_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

access_logger = logging.getLogger("server.access")


class JsonFormatter(logging.Formatter):
    """time (Unix seconds), level, logger, message, the process's name, then what the record brings of its own."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _KNOWN}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """LEVEL NAME: message, and the request's id where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        request_id = getattr(record, "request_id", None)
        if request_id is None or record.name == access_logger.name or request_id in line:
            return line
        head, newline, rest = line.partition("\n")  # a traceback stays below
        return f"{head} (X-Request-Id {request_id}){newline}{rest}"


def configure_logging(level: str, log_format: str, process: str = "server") -> None:
    """For the whole process. `process`: "server" or "engine"."""
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(JsonFormatter(process))
    else:
        name = "engine" if process == "engine" else "%(name)s"
        handler.setFormatter(TextFormatter(f"%(levelname)s {name}: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def add_request_ids(current: Callable[[], str | None]) -> None:
    """From now on what is logged has the `request_id` that `current` says, where it says one."""

    def add(record: logging.LogRecord) -> bool:
        request_id = current()
        if request_id is not None:
            record.request_id = request_id
        return True

    for handler in logging.getLogger().handlers:
        handler.addFilter(add)


def log_access(record: RequestRecord) -> None:
    """One line of the access log. Neither query nor body: both may hold what is nobody's business."""
    generated = None if record.generated is None else record.generated()
    fields: dict[str, object] = {
        "request_id": record.request_id,
        "client": record.client,
        "method": record.method,
        "path": record.path,
        "status": record.status or None,  # null: the client left before its answer began
        "seconds": round(record.seconds, 4),
    }
    if record.key_name is not None:
        fields["key"] = record.key_name
    if generated is not None:
        fields |= {"prompt_tokens": generated.num_prompt_tokens, "output_tokens": generated.num_output_tokens}
    text = " ".join(f"{name}={value}" for name, value in fields.items() if name not in ("method", "path", "client"))
    access_logger.info('%s "%s %s" %s', record.client, record.method, record.path, text, extra=fields)
