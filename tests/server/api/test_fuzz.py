"""Requests made at random from the OpenAPI document, against the real engine on a tiny model: every answer is one that the document
knows, and none is the server's fault."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from server.api.chat_template import ChatTemplate
from server.api.tools import TOOL_FORMATS
from tests.server.api.test_tools import TEMPLATE
from tests.server.real_edge import real_edge, tiny_checkpoint

_MAX_TOKENS = 20  # of an answer: the rest of the context would take long, and try nothing else


def shortened(body: Any, path: str) -> Any:
    """With a served model, and lengths that do not take long."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if "model" in body and isinstance(body["model"], str):
        body["model"] = "tiny"
    field = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    if "tokenize" not in path and "count" not in path and not (isinstance(body.get(field), int) and body[field] < 1):
        body[field] = _MAX_TOKENS
        body.pop("max_completion_tokens", None)
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], 2)
    return body


def check_operation(operation: Any, post: Any, num_cases: int) -> dict[int, int]:
    counts: dict[int, int] = {}

    @settings(max_examples=num_cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        try:
            content = json.dumps(shortened(case.body, operation.path)).encode()
        except (TypeError, ValueError):  # no JSON
            return
        answer: httpx.Response = post(operation.path, content)
        counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (content, answer.text)
        if answer.status_code != 200:
            assert answer.status_code >= 400 and answer.json()["error"]["message"], answer.text

    check()
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
     "/v1/embeddings", "/tokenize", "/detokenize"],
)  # fmt: skip
def test_no_request_is_the_servers_fault(tmp_path: Path, path: str) -> None:
    model = tiny_checkpoint(tmp_path)
    options = {"tool_format": TOOL_FORMATS["hermes"], "parses_reasoning": True}

    async def check() -> None:
        loop = asyncio.get_running_loop()
        async with real_edge(model, chat_template=ChatTemplate(TEMPLATE), **options) as http:
            document = (await http.get("/openapi.json")).json()
            assert {"200", "4XX", "5XX"} <= document["paths"][path]["post"]["responses"].keys()
            operation = schemathesis.openapi.from_dict(document)[path]["POST"]

            def post(path: str, content: bytes) -> httpx.Response:
                request = http.post(path, content=content, headers={"content-type": "application/json"})
                return asyncio.run_coroutine_threadsafe(request, loop).result(60)

            counts = await asyncio.to_thread(check_operation, operation, post, 40)
            assert sum(counts.values()) > 20

    asyncio.run(check())
