"""Who is let in: keys on every route, ways around them, limits of each key, CORS, and what none of it gives away."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from server.api.access import KeyLimits
from server.api.app import Cors, Gate
from server.config import EngineConfig, ServerConfig
from server.keys import load_keys, parse_keys
from tests.server.fakes import echo_engine, running_edge

ALICE, BOB = "alice-secret-0123456789", "bob-secret-0123456789"
KEYS = tuple(parse_keys([f"alice:{ALICE}", f"bob:{BOB}"], "test"))
BODY = {"prompt": "The dog", "max_tokens": 2}


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_every_route_but_probes_and_the_page_needs_a_key() -> None:
    async def check() -> None:
        async with running_edge(gate=Gate(KEYS)) as edge:
            paths = {route.path for route in edge.app.routes}
            assert {"/metrics", "/openapi.json", "/v1/models", "/v1/completions"} <= paths
            for path in sorted(paths):
                path = path.replace("{model:path}", "echo").replace("{name}", "key.js")
                for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"):
                    answer = await edge.http.request(method, path)
                    is_page = path == "/" or path.startswith("/static/")
                    is_open = path in ("/live", "/health", "/ready") or (is_page and method in ("GET", "HEAD"))
                    assert (answer.status_code == 401) != is_open, (method, path, answer.status_code)
            assert not edge.engine.submitted

    asyncio.run(check())


@pytest.mark.parametrize(
    "path",
    [
        "/static/../metrics", "/static/..%2fmetrics", "/metrics/", "/live/../metrics", "/live/", "/LIVE",
        "/live%00", "/live;/metrics", "/%6cive/x", "/v1/models/..", "/health/../v1/models", "/static/", "/static/a/b",
        "/nowhere", "/docs", "/redoc", "/v1/models?x=/live", "/openapi.json#/live",
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_goes_around(path: str) -> None:
    async def check() -> None:
        async with running_edge(gate=Gate(KEYS)) as edge:
            assert (await edge.http.get(path)).status_code == 401

    asyncio.run(check())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearer(ALICE), 200),
        (bearer(BOB), 200),
        ({"Authorization": f"bearer  {ALICE} "}, 200),
        ({"x-api-key": ALICE}, 200),
        ({"x-api-key": ALICE, **bearer(ALICE)}, 200),
        ({"x-api-key": ALICE, **bearer(BOB)}, 401),
        ({"Authorization": ALICE}, 401),
        ({"Authorization": f"Basic {ALICE}"}, 401),
        (bearer(""), 401),
        (bearer("alice"), 401),
        (bearer(f"alice:{ALICE}"), 401),
        (bearer(ALICE[:-1]), 401),
        (bearer(ALICE + "x"), 401),
        (bearer(ALICE.upper()), 401),
        ([("Authorization", f"Bearer {ALICE}"), ("Authorization", "Bearer x")], 401),
        ([("x-api-key", ALICE), ("x-api-key", ALICE)], 401),
        ({"Cookie": f"api_key={ALICE}"}, 401),
    ],
)
def test_what_counts_as_a_key(headers: Any, status: int) -> None:
    async def check() -> None:
        async with running_edge(gate=Gate(KEYS)) as edge:
            answer = await edge.http.post("/v1/completions", json=BODY, headers=headers)
            assert answer.status_code == status
            if status == 401:
                assert answer.headers["www-authenticate"] == "Bearer" and "x-request-id" in answer.headers
                assert answer.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")
                assert ALICE not in answer.text and "alice" not in answer.text

    asyncio.run(check())


def test_a_refusal_has_the_shape_that_its_client_reads() -> None:
    async def check() -> None:
        async with running_edge(gate=Gate(KEYS)) as edge:
            answer = await edge.http.post("/v1/messages", json={}, headers={"x-api-key": "wrong"})
            assert answer.status_code == 401
            assert answer.json() == {
                "type": "error",
                "error": {"type": "authentication_error", "message": "the API key is not one of this server's"},
            }

    asyncio.run(check())


def test_without_keys_everybody_may_ask() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            assert (await edge.http.post("/v1/completions", json=BODY, headers=bearer("any"))).status_code == 200

    asyncio.run(check())


def test_requests_per_minute_are_counted_for_each_key() -> None:
    reasons: list[str] = []

    async def check() -> None:
        gate = Gate(KEYS, KeyLimits(requests_per_minute=3), on_refused=reasons.append)
        async with running_edge(gate=gate) as edge:
            for secret in (ALICE, BOB):
                statuses = []
                for _ in range(5):
                    answer = await edge.http.post("/v1/completions", json=BODY, headers=bearer(secret))
                    statuses.append(answer.status_code)
                assert statuses == [200, 200, 200, 429, 429]
                assert 55 <= int(answer.headers["retry-after"]) <= 61
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert (await edge.http.get("/v1/models", headers=bearer(ALICE))).status_code == 200  # asks for no work
        assert reasons == ["key_requests_per_minute"] * 4

    asyncio.run(check())


def test_requests_at_once_are_counted_and_always_given_back() -> None:
    engine = echo_engine()

    async def check() -> None:
        async with running_edge(engine, gate=Gate(KEYS, KeyLimits(concurrent_requests=2))) as edge:

            async def post(secret: str, **fields: Any) -> int:
                answer = await edge.http.post("/v1/completions", json=BODY | fields, headers=bearer(secret))
                return answer.status_code

            for _ in range(3):
                engine.gate.clear()
                running = [asyncio.ensure_future(post(ALICE, stream=stream)) for stream in (True, False)]
                while edge.client.num_unfinished < 2:
                    await asyncio.sleep(0.005)
                assert await post(ALICE) == 429
                other = asyncio.ensure_future(post(BOB))
                await asyncio.sleep(0.02)
                other.cancel()  # a client that leaves
                engine.gate.set()
                assert await asyncio.gather(*running) == [200, 200]
                for wrong in ({"prompt": 5}, {"model": "other"}):  # errors give back as well
                    assert await post(ALICE, **wrong) in (400, 404)
                while edge.client.num_unfinished:
                    await asyncio.sleep(0.005)

    asyncio.run(check())


# -- CORS ----------------------------------------------------------------------------------------------------------------

PREFLIGHT = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}


def test_cors_is_off_unless_asked_for() -> None:
    async def check() -> None:
        async with running_edge(gate=Gate(KEYS)) as edge:
            answer = await edge.http.options("/v1/completions", headers=PREFLIGHT)
            assert answer.status_code == 401
            answer = await edge.http.get("/live", headers={"Origin": "https://app.example"})
            assert not [name for name in answer.headers if name.startswith("access-control")]

    asyncio.run(check())


def test_cors_lets_those_origins_ask_with_a_key() -> None:
    cors = Cors(("https://app.example",), headers=("Authorization",))

    async def check() -> None:
        async with running_edge(gate=Gate(KEYS, cors=cors)) as edge:
            answer = await edge.http.options(
                "/v1/completions", headers=PREFLIGHT | {"Access-Control-Request-Headers": "authorization"}
            )
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
            origin = {"Origin": "https://app.example"}
            for headers, status in ((origin, 401), (origin | bearer(ALICE), 200)):
                answer = await edge.http.post("/v1/completions", json=BODY, headers=headers)
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == "https://app.example"
            other = await edge.http.options("/v1/completions", headers=PREFLIGHT | {"Origin": "https://evil.example"})
            assert other.status_code == 400 and "access-control-allow-origin" not in other.headers

    asyncio.run(check())


# -- keys ----------------------------------------------------------------------------------------------------------------


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n\ncarol:{ALICE}\n  {BOB}\n")
    keys = load_keys(["dave:another-secret"], str(file))
    assert [(key.name, key.is_short) for key in keys] == [("dave", True), ("carol", False), ("key-2", False)]


@pytest.mark.parametrize(
    ("texts", "content", "part"),
    [
        (["a b"], None, "--api-key: the secret of key key-1"),
        (["näme:secret"], None, "--api-key: the name of key 1"),
        (["name:"], None, "--api-key: the secret of key name"),
        ([":secret"], None, "--api-key: the name of key 1"),
        (["a:swordfish", "b:swordfish"], None, "two keys have the same secret"),
        (["a:swordfish", "a:hunter"], None, "two keys have the same name"),
        ([], "# nothing\n", "there is no key in it"),
        ([], None, "No such file"),
    ],
)
def test_wrong_keys_are_named_without_their_secrets(
    texts: list[str], content: str | None, part: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError) as refused:
        load_keys(texts, None if texts else str(file))
    assert part in str(refused.value)
    assert not any(secret in str(refused.value) for secret in ("a b", "swordfish", "hunter"))


def test_secrets_do_not_show(caplog: pytest.LogCaptureFixture) -> None:
    assert ALICE not in repr(ServerConfig(EngineConfig("m"), api_keys=(f"alice:{ALICE}",)))
    assert ALICE not in repr(KEYS) and KEYS[0].digest.hex() not in repr(KEYS)

    async def check() -> None:
        with caplog.at_level(logging.DEBUG):
            async with running_edge(gate=Gate(KEYS)) as edge:
                await edge.http.post("/v1/completions", json=BODY, headers=bearer(ALICE))
                await edge.http.post("/v1/completions", json=BODY, headers=bearer(ALICE + "x"))
        assert ALICE not in caplog.text

    asyncio.run(check())
