"""Requests made at random from the OpenAPI document, right ones and wrong ones, against a server with the real engine on a tiny
model: every answer is one that the document knows, to the last field and event, and none is the server's fault.

`make fuzz` makes 5,000 of them and more; FUZZ_CASES sets the number per operation.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.config import ChecksConfig, PositiveDataAcceptanceConfig

from tests.served import Server
from tests.server.api.test_tools import TEMPLATE
from tests.server.real_edge import tiny_checkpoint

CASES = int(os.environ.get("FUZZ_CASES", "20"))
MAX_TOKENS = 16  # of an answer: the rest of the context would take long, and try nothing else
LENGTHS = {
    "/v1/completions": ("max_tokens",),
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
BODIES = (*LENGTHS, "/v1/messages/count_tokens", "/v1/embeddings", "/tokenize", "/detokenize")
QUERIES = ("/v1/models", "/v1/models/{model}", "/version", "/live", "/health", "/ready", "/metrics")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("fuzz")
    model = tiny_checkpoint(root / "tiny")
    (root / "template.jinja").write_text(TEMPLATE)
    flags = (
        "--chat-template",
        str(root / "template.jinja"),
        "--tool-call-parser",
        "hermes",
        "--reasoning-parser",
        "think",
    )
    limits = ("--max-model-len", "256", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "16M", "--threads", "1")
    more = ("--scheduling-policy", "priority", "--speculative", "ngram:4:1-3", "--generation-config", "none")
    with Server(model, *flags, *limits, *more) as server:
        yield server
    assert "Traceback" not in "".join(server.lines)


def shorten(body: Any, path: str) -> None:
    """A served model, and lengths that do not take long; wrong values stay wrong."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    fields = LENGTHS.get(path, ())
    for field in fields:
        value = body.get(field)
        if type(value) is int and MAX_TOKENS < value < 2**31:
            body[field] = MAX_TOKENS
    if fields and all(body.get(field) is None for field in fields):
        body[fields[0]] = MAX_TOKENS
    if type(body.get("n")) is int and 2 < body["n"] <= 128:
        body["n"] = 2
    timeout = body.get("timeout")
    if type(timeout) in (int, float) and 0 < timeout < 1:
        body["timeout"] = 1


def mend(body: Any) -> Any:
    """What the document cannot say put right, so that more than its words is tried: whole numbers as such, texts where there must
    be some, calls of assistants alone."""
    if isinstance(body, float) and body.is_integer():
        return int(body)
    if isinstance(body, list):
        return [mend(item) for item in body]
    if not isinstance(body, dict):
        return body
    mended = {key: mend(value) for key, value in body.items()}
    for field in ("prompt", "input"):
        if mended.get(field) == "":
            mended[field] = "a"
    if "role" in mended and mended["role"] != "assistant":
        mended.pop("tool_calls", None)
        mended["content"] = mended.get("content") or "the"
    for field in (
        "stream_options",
        "prompt_logprobs",
        "min_tokens",
        "continue_final_message",
        "logit_bias",
        "response_format",
    ):
        mended.pop(field, None)
    if mended.get("prompt") is not None:
        mended.pop("messages", None)
    return mended


def event_validator(document: dict[str, Any], path: str) -> jsonschema.Draft202012Validator | None:
    """Of what the data of a path's events is, where it streams."""
    content = document["paths"][path].get("post", {}).get("responses", {}).get("200", {}).get("content", {})
    if "text/event-stream" not in content:
        return None
    data = content["text/event-stream"]["schema"]["properties"]["data"]
    forms = [form["contentSchema"] for form in data.get("anyOf", [data]) if "contentSchema" in form]
    return jsonschema.Draft202012Validator({"anyOf": forms, "components": document["components"]})


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def check_operation(server: Server, path: str, method: str, mode: GenerationMode, num_cases: int) -> Counter[int]:
    document = server.client.get("/openapi.json").json()
    events = event_validator(document, path)
    schema = schemathesis.openapi.from_dict(document)
    # A right body may ask for what does not go together, or for another model: 400 and 404 are answers to that.
    acceptance = PositiveDataAcceptanceConfig(expected_statuses=["2xx", "400", "404"])
    schema.config.checks = ChecksConfig(positive_data_acceptance=acceptance)
    counts: Counter[int] = Counter()

    @settings(max_examples=num_cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and sum(counts.values()) % 2:
            case.body = mend(case.body)
        shorten(case.body, path)
        answer = case.call(base_url=server.url, timeout=60)
        counts[answer.status_code] += 1
        case.validate_response(answer)
        if answer.headers["content-type"][0].startswith("text/event-stream"):
            assert events is not None, "a stream that the document does not know"
            for event in events_of(answer.text):
                events.validate(event)

    check()
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", BODIES)
def test_bodies(server: Server, path: str, mode: GenerationMode) -> None:
    counts = check_operation(server, path, "POST", mode, CASES)
    print(path, mode.value, dict(counts))
    assert sum(counts.values()) > CASES // 4 and (mode is GenerationMode.NEGATIVE or counts[200])


@pytest.mark.slow
@pytest.mark.parametrize("path", QUERIES)
def test_queries(server: Server, path: str) -> None:
    counts = check_operation(server, path, "GET", GenerationMode.POSITIVE, max(CASES // 20, 3))
    assert counts
