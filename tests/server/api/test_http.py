"""The application behind a real HTTP server: official clients, clients that leave, and an engine that dies."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from server.engine.client import EngineState
from server.types import AbortReason
from tests.server.fakes import Edge, byte_level_tokenizer, echo_engine, served_edge, sse_events, wait_until

TEXT = "The quick brown fox jumps over the lazy dog."
TOKENIZER = byte_level_tokenizer()


# -- the official client -------------------------------------------------------------------------------------------------


def test_openai_client() -> None:
    with served_edge(echo_engine(step_seconds=0.001)) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        assert [model.id for model in client.models.list()] == ["echo", "alias"]
        assert client.models.retrieve("alias").id == "alias"

        completion = client.completions.create(model="echo", prompt=TEXT, max_tokens=100, stop=" dog", temperature=0)
        assert completion.choices[0].text == TEXT.removesuffix(" dog.")
        assert completion.choices[0].finish_reason == "stop"
        assert completion.usage is not None
        assert completion.usage.completion_tokens == len(TOKENIZER.encode(TEXT)) - 1
        stream = client.completions.create(
            model="echo", prompt=TEXT, max_tokens=100, stop=" dog", stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == completion.choices[0].text
        assert chunks[-1].usage == completion.usage

        chat = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hi"}], n=2, seed=0)
        assert [choice.message.content for choice in chat.choices] == ["[user] hi", "user] hi"]
        with client.chat.completions.stream(model="echo", messages=[{"role": "user", "content": "hi"}]) as events:
            final = events.get_final_completion()
        assert final.choices[0].message.content == "[user] hi"

        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="echo", prompt=TEXT, temperature=9)
        assert refused.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
        assert missing.value.code == "model_not_found"


def test_async_openai_client_many_at_once() -> None:
    async def check(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:

            async def one(number: int) -> str:
                prompt = f"dog {number} fox"
                stream = await client.completions.create(model="echo", prompt=prompt, max_tokens=30, stream=True)
                text = "".join([chunk.choices[0].text async for chunk in stream])
                assert text == (prompt * 30)[: len(text)]
                return text

            assert len(set(await asyncio.gather(*(one(number) for number in range(32))))) == 32

    with served_edge(echo_engine(step_seconds=0.001)) as (url, edge):
        asyncio.run(check(url))
        assert edge.client.num_unfinished == 0


# -- clients that leave --------------------------------------------------------------------------------------------------


def _send(url: str, path: str, body: dict[str, object]) -> socket.socket:
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=10)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_has_all_its_choices_aborted(streamed: bool) -> None:
    body: dict[str, object] = {"prompt": [TEXT, "dog"], "n": 2, "max_tokens": 400, "stream": streamed}
    with served_edge(echo_engine(step_seconds=0.002)) as (url, edge):
        connection = _send(url, "/v1/completions", body)
        if streamed:
            assert b"text_completion" in connection.recv(4096) + connection.recv(4096)
        else:
            wait_until(lambda: len(edge.engine.running) == 4)
        connection.close()
        wait_until(lambda: not edge.engine.running)
        assert sorted(edge.engine.aborted) == sorted(
            (request.request_id, AbortReason.CLIENT) for request in edge.engine.submitted
        )
        wait_until(lambda: edge.client.num_unfinished == 0)
        assert 'finished_reason="abort",model_name="echo"} 4.0' in httpx.get(f"{url}/metrics").text


def test_a_client_that_leaves_mid_body_reaches_no_engine() -> None:
    with served_edge() as (url, edge):
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            connection.sendall(head)
        assert httpx.get(f"{url}/health").status_code == 200
        assert not edge.engine.submitted


def test_a_slow_reader_gets_everything() -> None:
    """The engine runs ahead; what has piled up comes in fewer, larger chunks."""
    with served_edge(echo_engine(max_model_len=2048)) as (url, _):
        body = {"prompt": TEXT, "max_tokens": 1500, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
            time.sleep(0.3)
            text = "".join(event["choices"][0]["text"] for event in sse_events(response.read().decode()))
        assert len(TOKENIZER.encode(text)) == pytest.approx(1500, rel=0.05)
        assert text == (TEXT * 1500)[: len(text)]


# -- an engine that dies -------------------------------------------------------------------------------------------------

POISON = 300


def _post(url: str, **body: object) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": TEXT, **body}, timeout=20)


def test_engine_failure_answers_everyone_and_shows_in_health() -> None:
    engine = echo_engine(step_seconds=0.002, fail_on_token=POISON)
    may_build = threading.Event()
    may_build.set()
    with served_edge(engine, on_build=lambda: may_build.wait(20) or None) as (url, edge):
        assert httpx.get(f"{url}/ready").status_code == 200
        body: dict[str, object] = {"prompt": TEXT, "max_tokens": 400, "stream": True}

        def begun_stream() -> socket.socket:
            connection = _send(url, "/v1/completions", body)
            while b"data: " not in connection.recv(65536):
                pass
            return connection

        streaming = begun_stream()
        response = _post(url, prompt=[POISON])
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_error"
        assert "again when it was retried" in response.json()["error"]["message"]
        text = b""
        while b"[DONE]" not in text:
            text += streaming.recv(65536)
        assert b'"error":{"message":"the engine stopped' in text
        streaming.close()

        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
        response = _post(url, prompt=[POISON])
        assert response.status_code == 400 and response.json()["error"]["code"] == "refused_fingerprint"
        several: dict[str, object] = {"prompt": [[5, 6], [POISON]], "stream": True}
        assert _post(url, **several).status_code == 400
        wait_until(lambda: not edge.client.num_unfinished)  # the first of them was submitted, and taken back

        assert _post(url).status_code == 200

        may_build.clear()
        streaming = begun_stream()
        poison = _send(url, "/v1/completions", {"prompt": [POISON, 5], "max_tokens": 1})
        wait_until(lambda: edge.client.state is EngineState.RESTARTING)
        for path in ("/health", "/ready"):
            response = httpx.get(url + path)
            assert response.status_code == 503
            assert response.json()["error"]["type"] == "service_unavailable"
        assert httpx.get(f"{url}/live").status_code == 200
        response = _post(url)
        assert response.status_code == 503
        assert "starting anew" in response.json()["error"]["message"]
        assert "retry-after" in response.headers
        may_build.set()
        wait_until(lambda: not edge.client.num_unfinished)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
        streaming.close()
        poison.close()
        metrics = httpx.get(f"{url}/metrics").text
        assert 'finished_reason="error",model_name="echo"} 4.0' in metrics
        for name, value in (("engine_restarts", 4), ("retried_requests", 2), ("refused_fingerprints", 2)):
            assert f'awqserve_{name}_total{{engine="0",model_name="echo"}} {value}.0' in metrics
        assert engine.is_closed


def test_draining_finishes_what_runs_and_refuses_the_rest() -> None:
    def drain(edge: Edge, seconds: float) -> bool:
        return asyncio.run_coroutine_threadsafe(edge.client.drain(seconds), edge.loop).result(20)

    with (
        served_edge(echo_engine(step_seconds=0.005)) as (url, edge),
        _send(url, "/v1/completions", {"prompt": TEXT, "max_tokens": 60}) as connection,
    ):
        wait_until(lambda: len(edge.engine.running) == 1)
        assert not drain(edge, 0.01)
        assert edge.client.state is EngineState.DRAINING
        assert httpx.get(f"{url}/health").status_code == 503
        assert _post(url).status_code == 503
        assert drain(edge, 10)
        answer = b""
        while b'"completion_tokens"' not in answer:  # head and body may come apart
            part = connection.recv(65536)
            assert part, answer
            answer += part
        assert b'"completion_tokens":60' in answer
