"""Every refusal is in OpenAI's envelope, says what is wrong and where, and leaves the engine alone."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from server.api.errors import RequestError, error_response, messages_error_body
from tests.server.fakes import Edge, echo_engine, running_edge

# (body of /v1/completions less its prompt, the field named, a part of the message)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[]"}}
BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": 5}, "prompt", "must be a string"),
    ({"prompt": None}, "prompt", "must be a string"),
    ({"prompt": {}}, "prompt", "must be a string"),
    ({"prompt": [True]}, "prompt", "must be a string"),
    ({"prompt": []}, "prompt", "at least 1"),
    ({"prompt": ""}, "prompt", "must not be empty"),
    ({"prompt": ["a", ""]}, "prompt", "must not be empty"),
    ({"prompt": [[1], []]}, "prompt.1", "at least 1"),
    ({"prompt": ["a", 1]}, "prompt.1", "valid string"),
    ({"prompt": [1, "a"]}, "prompt.1", "valid integer"),
    ({"prompt": [1, -1]}, "prompt.1", "greater than or equal to 0"),
    ({"prompt": [1.5]}, "prompt", "must be a string"),
    ({"prompt": [1, 1.5]}, "prompt.1", "integer"),
    ({"prompt": [99999]}, "prompt", "outside the vocabulary of 400"),
    ({"prompt": [2**40]}, "prompt.0", "less than or equal"),
    ({"prompt": ["a"] * 1025}, "prompt", "at most 1024"),
    ({"max_tokens": "5"}, "max_tokens", "integer"),
    ({"max_tokens": 0}, "max_tokens", "at least 1 without echo"),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"max_tokens": True}, "max_tokens", "integer"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2 (got 2.5)"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"min_p": 2}, "min_p", "less than or equal to 1"),
    ({"seed": 2**70}, "seed", ""),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"stop": ""}, "stop", "at least 1 character"),
    ({"stop": ["a", ""]}, "stop.1", "at least 1 character"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": 3}, "stop", "must be a string or a list of strings"),
    ({"stop": [3]}, "stop", "must be a string or a list of strings"),
    ({"stop_token_ids": [400]}, "stop_token_ids", "outside the vocabulary"),
    ({"max_tokens": 16, "min_tokens": 17}, "min_tokens", "at most max_tokens (16)"),
    ({"allowed_token_ids": [400]}, "allowed_token_ids", "outside the vocabulary"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
    ({"bad_words": [""]}, "bad_words.0", "at least 1 character"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not available with stream"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or at least 1"),
    ({"typical_p": 0}, "typical_p", "greater than 0"),
    ({"priority": 1}, "priority", "--scheduling-policy priority"),
    ({"priority": 1001}, "priority", "less than or equal"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when stream is true"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"best_of": 2}, "best_of", "not supported; leave it out or send null or 1"),
    ({"best_of": True}, "best_of", "not supported"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
    ({"logit_bias": {"400": 1}}, "logit_bias", "token ids from 0 to 399"),
    ({"logit_bias": {"dog": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
    ({"response_format": {"type": "xml"}}, "response_format", "does not match any of the expected tags"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx", "unknown"),
    ({"guided_json": {}}, "guided_json", "unknown or unsupported field"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "unknown or unsupported field"),
    ({"model": 5}, "model", "string"),
]


async def refused(edge: Edge, path: str, status: int, **request: Any) -> dict[str, Any]:
    response = await edge.http.request(request.pop("method", "POST"), path, **request)
    assert response.status_code == status, response.text
    assert not edge.engine.submitted
    return envelope(response)


def envelope(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"]
    return body["error"]


def test_bad_fields_are_named() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            for body, field, part in BAD_FIELDS:
                error = await refused(edge, "/v1/completions", 400, json={"prompt": "dog", **body})
                assert error["type"] == "invalid_request_error", body
                assert error["param"] == field, (body, error)
                assert error["message"].startswith(f"{field}: "), (body, error)
                assert part in error["message"], (body, error)
                assert len(error["message"]) < 300

    asyncio.run(check())


def test_all_bad_fields_are_named_at_once() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            error = await refused(edge, "/v1/completions", 400, json={"temperature": 3, "top_p": 0, "x": 1})
            for field in ("prompt: field required", "temperature: ", "top_p: ", "x: unknown"):
                assert field in error["message"]

    asyncio.run(check())


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "user"}, "messages.0.content"),
        ({"role": "judge", "content": "x"}, "messages.0.role"),
        ({"role": "user", "content": 5}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages.0.content.0.type"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages.0.tool_calls.0.id"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages.0.tool_calls"),
        ({"role": "assistant", "content": "x", "tool_calls": [CALL]}, "messages.0.tool_calls"),
        ("hi", "messages.0"),
    ],
)
def test_bad_messages_are_named(message: Any, field: str) -> None:
    async def check() -> None:
        async with running_edge() as edge:
            error = await refused(edge, "/v1/chat/completions", 400, json={"messages": [message]})
            assert error["param"] == field

    asyncio.run(check())


def test_chat_fields_that_come_later_are_refused_by_name() -> None:
    unsupported = {
        "functions": [{}], "modalities": ["audio"], "store": True,
        "reasoning_effort": "low", "chat_template": "x", "echo": True,
    }  # fmt: skip
    messages = [{"role": "user", "content": "hi"}]

    async def check() -> None:
        async with running_edge() as edge:
            for field, value in unsupported.items():
                error = await refused(edge, "/v1/chat/completions", 400, json={"messages": messages, field: value})
                assert error["param"] == field
                assert "not supported" in error["message"]
            error = await refused(edge, "/v1/chat/completions", 400, json={"messages": messages, "top_logprobs": 3})
            assert error["message"] == "top_logprobs: only allowed when logprobs is true"
            for name in ("messages", "add_generation_prompt"):  # what the body has fields for
                body = {"messages": messages, "chat_template_kwargs": {name: []}}
                error = await refused(edge, "/v1/chat/completions", 400, json=body)
                assert error["param"] == f"chat_template_kwargs.{name}"
            for name, value in (("tools", []), ("add_generation_prompt", True), ("chat_template_kwargs", {"a": 1})):
                error = await refused(edge, "/tokenize", 400, json={"prompt": "dog", name: value})
                assert error["message"] == f"{name}: only for messages"
            error = await refused(edge, "/v1/chat/completions", 400, json={"messages": []})
            assert error["param"] == "messages"

    asyncio.run(check())


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": NaN}', ""),
        (b'{"prompt": "a", "temperature": NaN}', ""),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'"text"', "object"),
        (b"[]", "object"),
    ],
)
def test_bodies_that_are_no_json_object(body: bytes, part: str) -> None:
    async def check() -> None:
        async with running_edge() as edge:
            headers = {"content-type": "application/json; charset=utf-8"}
            error = await refused(edge, "/v1/completions", 400, content=body, headers=headers)
            assert part in error["message"]

    asyncio.run(check())


def test_prompts_that_do_not_fit() -> None:
    async def check() -> None:
        async with running_edge(echo_engine(max_model_len=32)) as edge:
            error = await refused(edge, "/v1/completions", 400, json={"prompt": [7] * 33})
            assert error["code"] == "context_length_exceeded"
            assert error["message"] == (
                "This model's maximum context length is 32 tokens. However, your prompt contains 33 input tokens, which "
                "exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
            )
            error = await refused(edge, "/v1/completions", 400, json={"prompt": [7] * 32})
            assert "no room for output tokens" in error["message"]
            error = await refused(edge, "/v1/completions", 400, json={"prompt": "dog " * 20_000})
            assert "at least" in error["message"]
            error = await refused(
                edge, "/v1/chat/completions", 400, json={"messages": [{"role": "user", "content": "dog " * 100}]}
            )
            assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")

    asyncio.run(check())


def test_models_and_routes_that_do_not_exist() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            error = await refused(edge, "/v1/completions", 404, json={"prompt": "dog", "model": "other"})
            assert (error["code"], error["param"]) == ("model_not_found", "model")
            assert "`other`" in error["message"]
            assert (await refused(edge, "/v1/models/other", 404, method="GET"))["code"] == "model_not_found"
            assert "GET /v1/nothing" in (await refused(edge, "/v1/nothing", 404, method="GET"))["message"]
            assert (await refused(edge, "/v1/completions", 405, method="GET"))["code"] == "method_not_allowed"
            assert (await refused(edge, "/health", 405, method="POST"))["code"] == "method_not_allowed"

    asyncio.run(check())


def test_content_type_and_size() -> None:
    async def check() -> None:
        async with running_edge(max_request_bytes=1000) as edge:
            form = {"content-type": "application/x-www-form-urlencoded"}
            error = await refused(edge, "/v1/completions", 415, content=b'{"prompt": "dog"}', headers=form)
            assert "application/x-www-form-urlencoded" in error["message"]
            await refused(edge, "/v1/completions", 415, content=b'{"prompt": "dog"}')
            assert (await refused(edge, "/v1/completions", 413, json={"prompt": "d" * 1000}))[
                "code"
            ] == "request_too_large"

            async def chunks() -> Any:
                for _ in range(11):
                    yield b" " * 100

            headers = {"content-type": "application/json"}
            await refused(edge, "/v1/completions", 413, content=chunks(), headers=headers)

    asyncio.run(check())


def test_faults_of_ours_show_nothing_of_themselves() -> None:
    async def check() -> None:
        async with running_edge(render_metrics=lambda: 1 / 0) as edge:  # type: ignore[arg-type,return-value]
            response = await edge.http.get("/metrics")
            assert response.status_code == 500
            assert envelope(response) == {
                "message": "internal error",
                "type": "server_error",
                "param": None,
                "code": "internal_error",
            }

    asyncio.run(check())


def test_paths_are_in_no_error() -> None:
    for message, shown in (
        ("the engine is down: OSError: [Errno 28] No space left on device: '/model/x y.bin'", "'... y.bin'"),
        ("cannot read /srv/models/secret-name/config.json: gone", "read ...: gone"),
        ("at ~/models and C:\\models\\x, but and/or 3/4 stay", "at ... and ..., but and/or 3/4 stay"),
    ):
        body = error_response(RequestError(message, status=503)).body.decode()
        assert "secret-name" not in body and "/model" not in body and shown in body.replace("\\\\", "\\")
        assert "/srv" not in str(messages_error_body(RequestError(message, status=500)))


def test_bad_requests_do_not_disturb_the_others() -> None:
    async def check() -> None:
        async with running_edge(echo_engine(step_seconds=0.001)) as edge:
            good = [
                asyncio.ensure_future(edge.http.post("/v1/completions", json={"prompt": "dog", "max_tokens": 100}))
                for _ in range(5)
            ]
            bad = [edge.http.post("/v1/completions", json={"prompt": "dog", **body}) for body, *_ in BAD_FIELDS]
            assert all(response.status_code == 400 for response in await asyncio.gather(*bad))
            answers = [response.json() for response in await asyncio.gather(*good)]
            assert all(answer["usage"]["completion_tokens"] == 100 for answer in answers)

    asyncio.run(check())
