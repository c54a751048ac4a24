"""The log's two formats, and that an access log tells who asked for what without its content."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest

from server.api.app import Gate
from server.keys import parse_keys
from server.logs import JsonFormatter, TextFormatter, add_request_ids, configure_logging, log_access
from server.record import current_record
from tests.server.fakes import running_edge

SECRET = "a-secret-of-some-length"


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def _requests(log_format: str, root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> list[str]:
    configure_logging("info", log_format)
    add_request_ids(lambda: None if (record := current_record()) is None else record.request_id)

    async def check() -> None:
        gate = Gate(tuple(parse_keys([f"alice:{SECRET}"], "test")), recorders=(log_access,))
        async with running_edge(gate=gate, num_logged_characters=None) as edge:
            headers = {"Authorization": f"Bearer {SECRET}", "X-Request-Id": "my-id"}
            body = {"prompt": "The quick secret dog", "max_tokens": 3}
            await edge.http.post("/v1/completions?key=hidden", json=body, headers=headers)
            await edge.http.get("/v1/a%0aINFO%20forged", headers=headers)
            await edge.http.get("/v1/models")

    asyncio.run(check())
    return capsys.readouterr().err.splitlines()


def test_access_log_as_json(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in _requests("json", root_logger, capsys)]
    first, forged, refused = [line for line in lines if line["logger"] == "server.access"]
    assert first["request_id"] == "my-id" and first["key"] == "alice" and first["status"] == 200
    assert first["path"] == "/v1/completions" and first["method"] == "POST" and first["output_tokens"] == 3
    assert first["process"] == "server" and first["level"] == "info" and first["seconds"] >= 0
    assert forged["path"] == "/v1/a%0aINFO%20forged" and forged["status"] == 404
    assert refused["status"] == 401 and "key" not in refused
    for word in ("quick", SECRET, "hidden"):
        assert word not in json.dumps(lines)


def test_access_log_as_text(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _requests("text", root_logger, capsys)
    [first] = [line for line in lines if "request_id=my-id" in line and "/v1/completions" in line]
    assert first.startswith('INFO server.access: 127.0.0.1 "POST /v1/completions" request_id=my-id status=200')
    assert "key=alice" in first and not any(word in "\n".join(lines) for word in ("quick", SECRET, "hidden"))
    assert not any(line.startswith("INFO forged") for line in lines)


def test_exceptions_and_extras() -> None:
    record = logging.makeLogRecord({"name": "a", "levelname": "ERROR", "msg": "x %s", "args": ("y",), "step": 3})
    record.request_id = "id"
    try:
        raise ValueError("broken\nline")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    written = JsonFormatter("engine").format(record)
    assert "\n" not in written
    fields = json.loads(written)
    assert (fields["message"], fields["step"], fields["process"]) == ("x y", 3, "engine")
    assert "ValueError: broken" in fields["exception"]
    text = TextFormatter("%(levelname)s %(name)s: %(message)s").format(record)
    assert text.startswith("ERROR a: x y (X-Request-Id id)\nTraceback")


@pytest.mark.parametrize("num_characters", [None, 9])
def test_prompts_are_logged_only_where_asked_for(num_characters: int | None, caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with running_edge(num_logged_characters=num_characters) as edge:
            body = {"prompt": "The quick\nbrown fox", "max_tokens": 3}
            assert (await edge.http.post("/v1/completions", json=body)).status_code == 200

    with caplog.at_level(logging.DEBUG):
        asyncio.run(check())
    assert ("'The quick'" in caplog.text) == (num_characters is not None)
    assert "brown" not in caplog.text
