"""Bodies made to cost much more than they weigh: refused with few words, and soon."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.server.fakes import echo_engine, running_edge

SIZE = 2**22  # bytes
JSON = {"Content-Type": "application/json"}

COMPLETION_BOMBS = {
    "ids that are none": b'{"prompt": [1,' + b'"",' * (SIZE // 3) + b"1]}",
    "lists of lists": b'{"prompt": [' + b"[1]," * (SIZE // 4) + b"[1]]}",
    "texts": b'{"prompt": [' + b'"a",' * (SIZE // 4) + b'"a"]}',
    "unknown fields": b'{"prompt": "a"' + b"".join(b',"%d":1' % number for number in range(SIZE // 9)) + b"}",
    "fewer of them": b'{"prompt": "a"' + b"".join(b',"%d":1' % number for number in range(150_000)) + b"}",
    "depth": b'{"prompt": ' + b"[" * SIZE + b"}",
    "ids": b'{"prompt": [' + b"1," * (SIZE // 2) + b"1]}",
    "text": b'{"prompt": "' + b"a" * SIZE + b'"}',
    "spaces": b'{"prompt": "' + b" " * SIZE + b'"}',
    "an escaped text": b'{"prompt": "' + b"\\u0000" * (SIZE // 6) + b'"}',
    "spaces around": b" " * SIZE + b'{"prompt": 5}',
}
CHAT_BOMBS = {
    "messages that are none": b'{"messages": [' + b"1," * (SIZE // 2) + b"1]}",
    "parts that are none": b'{"messages": [{"role": "user", "content": [' + b"{}," * (SIZE // 3) + b"{}]}]}",
    "template variables": b'{"messages": [], "chat_template_kwargs": {"a": [' + b"[]," * (SIZE // 3) + b"[]]}}",
    "deep variables": b'{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": '
    + b"[" * 300 + b"]" * 300 + b"}}",
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *(pytest.param("/v1/completions", body, id=name) for name, body in COMPLETION_BOMBS.items()),
        *(pytest.param("/v1/chat/completions", body, id=name) for name, body in CHAT_BOMBS.items()),
    ],
)
def test_json_bombs(path: str, body: bytes) -> None:
    """None keeps the event loop as long as it used to: seconds to a minute."""

    async def check() -> None:
        async with running_edge(max_request_bytes=2 * SIZE) as edge:
            begin = time.process_time()
            answer = await edge.http.post(path, content=body, headers=JSON)
            assert answer.status_code in (400, 413), answer.text[:200]
            assert len(answer.text) < 3000
            assert time.process_time() - begin < 2.0
            assert not edge.engine.submitted

    asyncio.run(check())


@pytest.mark.parametrize("depth", [150, 100_000])
def test_arguments_of_calls_are_json_in_json(depth: int) -> None:
    arguments = '{"a":' * depth + "1" + "}" * depth
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "content": "x", "tool_calls": [call]}]

    async def check() -> None:
        async with running_edge(echo_engine(max_model_len=4096)) as edge:
            answer = await edge.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
            assert answer.status_code == (200 if depth == 150 else 400), answer.text[:300]

    asyncio.run(check())


def test_nested_too_deep_says_so() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            answer = await edge.http.post("/v1/completions", content=b"[" * 1000, headers=JSON)
            assert answer.status_code == 400 and "more than 200 levels deep" in answer.json()["error"]["message"]

    asyncio.run(check())


def test_tokenizing_has_a_bound_of_its_own() -> None:
    async def check() -> None:
        async with running_edge(max_request_bytes=2 * SIZE) as edge:
            for path, body in (
                ("/tokenize", {"prompt": " " * (2**20 + 1)}),
                (
                    "/v1/messages/count_tokens",
                    {"messages": [{"role": "user", "content": " " * 2**20}], "model": "echo"},
                ),
            ):
                answer = await edge.http.post(path, json=body)
                assert answer.status_code == 400 and "1048576 characters" in answer.text

    asyncio.run(check())
