"""While the model loads for the first time, and while another takes its place: who is answered what."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx

from server.api.app import create_app
from server.api.context import ApiContext, ContextSource
from server.engine.client import EngineClient, EngineState, EngineUnavailable
from server.engine.process import ThreadHandle, thread_engine
from tests.server.fakes import EchoEngine, byte_level_tokenizer, echo_engine, sse_events

BODY: dict[str, Any] = {"prompt": "The dog", "max_tokens": 4}


def context_over(client: EngineClient, name: str) -> ApiContext:
    tokenizer = byte_level_tokenizer()
    return ApiContext(
        client, tokenizer, (name,), tokenizer.vocab_size, lambda: (b"", "text/plain"), 0, 2**20, version="v"
    )


class Loader:
    """Starts echo engines, each of which waits to be let go."""

    def __init__(self) -> None:
        self.engines: list[EchoEngine] = []
        self.gate = threading.Event()
        self.fails = False

    def __call__(self, epoch: int) -> ThreadHandle:
        engine = echo_engine(step_seconds=0.005)
        engine.restart(epoch)
        self.engines.append(engine)

        def build() -> EchoEngine:
            self.gate.wait(20)
            if self.fails:
                raise ValueError("planted: does not load")
            return engine

        return thread_engine(build, epoch)


@asynccontextmanager
async def loading() -> AsyncIterator[tuple[Loader, EngineClient, ContextSource, httpx.AsyncClient]]:
    loader = Loader()
    client = EngineClient(loader)
    source = ContextSource(client, "v")
    transport = httpx.ASGITransport(app=create_app(source), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://edge", timeout=20) as http:
        try:
            yield loader, client, source, http
        finally:
            loader.gate.set()
            await client.stop()


async def begin(loader: Loader, client: EngineClient, source: ContextSource) -> None:
    loader.gate.set()
    await client.start()
    source.replace(context_over(client, "first"))


def test_while_it_loads_only_the_probes_have_an_answer() -> None:
    async def check() -> None:
        async with loading() as (loader, client, source, http):
            starting = asyncio.ensure_future(client.start())
            await asyncio.sleep(0)
            assert (await http.get("/live")).status_code == 200
            for method, path in (
                *(("GET", path) for path in ("/health", "/ready", "/metrics", "/v1/models", "/", "/version")),
                *(("POST", path) for path in ("/v1/completions", "/v1/embeddings", "/tokenize")),
            ):
                answer = await http.request(method, path, json=BODY if method == "POST" else None)
                assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1, path
                assert answer.json()["error"]["code"] == "engine_unavailable"
            loader.gate.set()
            await starting
            assert (await http.get("/health")).status_code == 503  # no tokenizer yet
            source.replace(context_over(client, "first"))
            assert (await http.get("/health")).status_code == 200
            assert (await http.post("/v1/completions", json=BODY)).json()["model"] == "first"

    asyncio.run(check())


def test_a_reload_drops_nothing() -> None:
    async def check() -> None:
        async with loading() as (loader, client, source, http):
            await begin(loader, client, source)
            streams = [
                asyncio.ensure_future(http.post("/v1/completions", json=BODY | {"max_tokens": 40, "stream": streamed}))
                for streamed in (True, False)
            ]
            while len(loader.engines[0].running) < 2:
                await asyncio.sleep(0.005)
            loader.gate.clear()

            async def reload() -> None:
                await source.close(10)
                await client.reload(loader, 10)
                source.replace(context_over(client, "second"))
                source.open()

            reloading = asyncio.ensure_future(reload())
            await asyncio.sleep(0.01)
            late = [asyncio.ensure_future(http.post("/v1/completions", json=BODY)) for _ in range(3)]
            assert (await http.get("/health")).status_code == 503 and (await http.get("/live")).status_code == 200
            streamed, whole = await asyncio.gather(*streams)
            assert len(whole.json()["choices"][0]["text"]) > 0 and whole.json()["model"] == "first"
            assert whole.json()["usage"]["completion_tokens"] == 40
            assert sse_events(streamed.text)[-1]["choices"][0]["finish_reason"] == "length"
            assert not any(answer.done() for answer in late)
            loader.gate.set()
            await reloading
            assert {answer.json()["model"] for answer in await asyncio.gather(*late)} == {"second"}
            assert client.state is EngineState.READY and loader.engines[0].is_closed

    asyncio.run(check())


def test_a_reload_that_fails_serves_on_with_the_former() -> None:
    async def check() -> None:
        async with loading() as (loader, client, source, http):
            await begin(loader, client, source)
            broken = Loader()
            broken.fails = True
            broken.gate.set()
            await source.close(1)
            try:
                await client.reload(broken, 1)
            except EngineUnavailable as error:
                assert "does not load" in str(error)
            source.open()
            while client.state is not EngineState.READY:
                await asyncio.sleep(0.01)
            assert (await http.post("/v1/completions", json=BODY)).json()["model"] == "first"
            assert len(loader.engines) == 2

    asyncio.run(check())


def test_half_a_request_does_not_reach_another_model() -> None:
    """Its body was still on its way when the reload ended: its tokens would be another tokenizer's."""

    async def check() -> None:
        async with loading() as (loader, client, source, http):
            await begin(loader, client, source)
            finish_body = asyncio.Event()

            async def body() -> AsyncIterator[bytes]:
                yield b'{"prompt": "The dog", '
                await finish_body.wait()
                yield b'"max_tokens": 4}'

            headers = {"Content-Type": "application/json"}
            posting = asyncio.ensure_future(http.post("/v1/completions", content=body(), headers=headers))
            await asyncio.sleep(0.02)
            await source.close(0.05)
            await client.reload(loader, 1)
            source.replace(replace(context_over(client, "second"), created=1))
            source.open()
            finish_body.set()
            answer = await posting
            assert answer.status_code in (200, 503)
            assert answer.status_code == 503 or answer.json()["model"] == "second", json.dumps(answer.json())

    asyncio.run(check())
