"""What the HTTP server bounds: time, heads, bodies, connections and readers. Raw sockets against the application."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import re
import socket
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from server.http_protocol import MAX_HEADERS, MAX_PIPELINED, Guard, GuardedProtocol
from server.http_server import HttpServer
from tests.server.fakes import Edge, echo_engine, http_limits, served_edge, wait_until

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"prompt": "The dog", "max_tokens": 2}).encode()


# What server/http_protocol.py and server/http_server.py use of uvicorn that no documentation promises.
PROTOCOL_METHODS = (
    "connection_made", "connection_lost", "data_received", "pause_writing", "resume_writing", "timeout_keep_alive_handler",
    "on_message_begin", "on_url", "on_header", "on_headers_complete", "on_body", "on_message_complete",
    "on_response_complete", "_unset_keepalive_if_required",
)  # fmt: skip
PROTOCOL_FIELDS = ("loop", "parser", "pipeline", "cycle", "transport", "headers", "url", "timeout_keep_alive_task")
CYCLE_FIELDS = ("response_started", "response_complete", "disconnected", "keep_alive", "message_event")
SERVER_FIELDS = ("startup", "capture_signals", "server_state", "started", "should_exit")


def test_uvicorn_has_what_the_protocol_stands_on() -> None:
    """Fails by name where a new uvicorn has moved it, before any of the tests below fails for reasons hard to read."""

    async def check() -> dict[str, object]:
        config = uvicorn.Config(lambda scope: None, lifespan="off", log_config=None)
        config.load()
        protocol = HttpToolsProtocol(config=config, server_state=ServerState(), app_state={})
        transport = mock.Mock()
        transport.get_extra_info.return_value = None
        protocol.connection_made(transport)
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        for task in protocol.tasks:
            task.cancel()
        return {"protocol": protocol, "cycle": protocol.cycle, "server": uvicorn.Server(config)}

    made = asyncio.run(check())
    names = {"protocol": PROTOCOL_FIELDS, "cycle": CYCLE_FIELDS, "server": SERVER_FIELDS}
    missing = [f"{kind}.{name}" for kind, of in names.items() for name in of if not hasattr(made[kind], name)]
    missing += [f"HttpToolsProtocol.{name}" for name in PROTOCOL_METHODS if name not in vars(HttpToolsProtocol)]
    overridden = {name for name in vars(GuardedProtocol) if callable(getattr(HttpToolsProtocol, name, None))}
    assert not missing, f"uvicorn {uvicorn.__version__} lacks {missing}, on which server/http_protocol.py stands"
    assert overridden - {"__init__"} <= set(PROTOCOL_METHODS), "the list above is not complete"
    assert issubclass(HttpServer, uvicorn.Server)


@pytest.mark.parametrize("package", ["uvicorn", "httptools"])
def test_what_is_installed_is_within_the_tested_range(package: str) -> None:
    """A newer one is for whoever has run these tests with it to allow."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    [needed] = [one for one in project["dependencies"] if one.startswith(f"{package}>=")]
    bounds = re.fullmatch(rf"{package}>=([\d.]+),<([\d.]+)", needed)
    assert bounds, f"{needed} has no upper bound"
    least, installed, below = (
        tuple(map(int, version.split(".")[:2]))
        for version in (bounds[1], importlib.metadata.version(package), bounds[2])
    )
    assert least <= installed < below


class Served:
    """A served edge with the reasons of what its guard refused."""

    def __init__(self, url: str, edge: Edge, guard: Guard, reasons: list[str]) -> None:
        parts = urlsplit(url)
        self.url, self.edge, self.guard, self.reasons = url, edge, guard, reasons
        self._address = (parts.hostname, parts.port)

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self._address, timeout=10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def is_well(self) -> bool:
        return httpx.get(f"{self.url}/health", timeout=10).status_code == 200


@contextmanager
def served(engine: Any = None, context: dict[str, Any] | None = None, **limits: Any) -> Iterator[Served]:
    reasons: list[str] = []
    guard = Guard(http_limits(**limits), reasons.append)
    with served_edge(engine, guard, **(context or {})) as (url, edge):
        yield Served(url, edge, guard, reasons)
    assert guard.num_connections == 0 and not guard.idle, "connections are left in the count"


def answer_of(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection."""
    data = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return data
        if not piece:
            return data
        data += piece


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", b""), (b"\r\n", b""), (b"POST /v1/comp", b"408"), (HEAD, b"408"), (HEAD + b"X-A: 1\r\n", b"408")],
)
def test_a_head_must_come_in_time(sent: bytes, status: bytes) -> None:
    with served(header_timeout=0.3) as server, server.connect() as connection:
        begin = time.monotonic()
        connection.sendall(sent)
        answer = answer_of(connection)
        assert 0.2 < time.monotonic() - begin < 5
        assert answer[9:12] == status and (not status or b"header_timeout" in answer)
        assert server.reasons == ["header_timeout" if status else "idle_timeout"]
        assert server.is_well()


def test_trickling_does_not_extend_the_time() -> None:
    """Slowloris: a byte now and then."""
    with served(header_timeout=0.5) as server, server.connect() as connection:
        begin = time.monotonic()
        with pytest.raises(OSError):
            for byte in HEAD * 10:
                connection.sendall(bytes((byte,)))
                time.sleep(0.05)
        assert time.monotonic() - begin < 2
        assert server.reasons == ["header_timeout"]


@pytest.mark.parametrize("framing", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n5\r\n"])
def test_a_body_must_come_in_time(framing: bytes) -> None:
    with served(body_timeout=0.3) as server, server.connect() as connection:
        connection.sendall(HEAD + framing)
        for _ in range(3):
            connection.sendall(b" ")
            time.sleep(0.05)
        assert answer_of(connection)[9:12] == b"408"
        assert server.reasons == ["body_timeout"]
        assert not server.edge.engine.submitted and server.is_well()


def test_time_counts_for_receiving_alone() -> None:
    """An answer may take longer than every deadline, and a connection may be used again."""
    with served(echo_engine(step_seconds=0.2), header_timeout=0.3, body_timeout=0.3, send_timeout=0.3) as server:
        with httpx.Client(base_url=server.url, timeout=10) as client:
            for _ in range(2):
                answer = client.post("/v1/completions", json={"prompt": "The dog", "max_tokens": 4})
                assert answer.status_code == 200
        assert not server.reasons


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"X: " + b"a" * 20_000 + b"\r\n\r\n",
        HEAD + b"".join(b"X-%d: a\r\n" % number for number in range(MAX_HEADERS + 1)) + b"\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A" * 40_000,  # a name without end
        b"GET / HTTP/1.1\r\nA: " + b"a" * 40_000,  # a value without end
        b"\r\n" * 20_000,
    ],
)
def test_heads_have_bounds(head: bytes) -> None:
    with served() as server, server.connect() as connection:
        connection.sendall(head)
        assert answer_of(connection)[9:12] in (b"431", b"400", b"")
        assert server.reasons in (["header_limit"], ["bad_request"])
        assert server.is_well()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS to a plain port
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00" * 100,
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(request_bytes: bytes) -> None:
    with served() as server, server.connect() as connection:
        connection.sendall(request_bytes)
        assert answer_of(connection)[9:12] == b"400"
        assert server.reasons == ["bad_request"]
        assert server.is_well()


def test_trailers_are_no_headers() -> None:
    """A key behind the body must not count, nor may trailers fill the memory."""
    with served(max_body_bytes=1000) as server:
        chunk = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
        with server.connect() as connection:
            framing = b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
            connection.sendall(HEAD + framing + chunk + b"X-Request-Id: a b\r\n\r\n")
            assert answer_of(connection)[9:12] == b"200"
        with server.connect() as connection:
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk)
            with pytest.raises(OSError):
                for _ in range(1000):
                    connection.sendall(b"X: " + b"a" * 1000 + b"\r\n")
                    time.sleep(0.001)
        assert server.reasons == ["body_limit"]


def test_bodies_that_were_refused_are_not_read_for_ever() -> None:
    with served(max_body_bytes=10_000, context={"max_request_bytes": 10_000}) as server:
        with server.connect() as connection:
            connection.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n")
            assert connection.recv(1000)[9:12] == b"413"
            with pytest.raises(OSError):
                for _ in range(1000):
                    connection.sendall(b" " * 1000)
                    time.sleep(0.001)
        assert server.reasons == ["body_limit"] and server.is_well()


def test_the_longest_idle_connection_gives_way() -> None:
    with served(max_connections=5) as server:
        idle = [server.connect() for _ in range(5)]
        wait_until(lambda: server.guard.num_connections == 5)
        assert server.is_well()  # by a sixth
        assert idle[0].recv(1) == b"" and server.reasons[0] == "evicted"
        for connection in idle:
            connection.close()


def test_without_an_idle_one_a_connection_is_refused() -> None:
    engine = echo_engine()
    engine.gate.clear()
    with served(engine, max_connections=2) as server:
        busy = [server.connect() for _ in range(2)]
        for connection in busy:
            connection.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY))
        wait_until(lambda: server.guard.num_connections == 2 and not server.guard.idle)
        with server.connect() as connection:
            assert answer_of(connection)[9:12] == b"503"
        assert server.reasons == ["too_many_connections"]
        engine.gate.set()
        for connection in busy:
            assert answer_of(connection)[9:12] == b"200"
            connection.close()


def test_pipelined_requests_are_answered_in_order_and_are_few() -> None:
    with served() as server, server.connect() as connection:
        one = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
        connection.sendall(one + b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = answer_of(connection)
        assert answer.count(b"HTTP/1.1 200") == 2 and answer.index(b"cmpl-") < answer.index(b'"ok"')
    with served() as server, server.connect() as connection:
        connection.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n" * (MAX_PIPELINED + 5))
        answer_of(connection)
        assert server.reasons == ["bad_request"] and server.is_well()


@pytest.mark.parametrize(
    "behind", [b"\x00\x01", b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000, b"GET /live HTTP/1.1\r\n\r\n" * 50]
)
def test_what_comes_behind_a_request_never_answers_it(behind: bytes) -> None:
    """A refusal of the second request in the middle of the first one's answer would be read as that."""
    engine = echo_engine()
    engine.gate.clear()
    with served(engine) as server, server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY))
        wait_until(lambda: server.edge.client.num_unfinished == 1)
        connection.sendall(behind)
        assert answer_of(connection) == b""
        engine.gate.set()
        wait_until(lambda: server.edge.client.num_unfinished == 0)
        assert len(server.reasons) == 1 and server.is_well()


def test_a_head_that_is_late_does_not_cut_the_answer_before_it() -> None:
    with (
        served(echo_engine(step_seconds=0.2), header_timeout=0.2, max_connections=1) as server,
        server.connect() as connection,
    ):
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%sGET /live" % (len(BODY), BODY))
        wait_until(lambda: server.edge.client.num_unfinished == 1)
        assert not server.guard.idle  # nor may it give way to others
        answer = answer_of(connection)
        assert answer[9:12] == b"200" and b"cmpl-" in answer


def test_websockets_are_not_spoken() -> None:
    with served() as server, server.connect() as connection:
        upgrade = (
            b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
        )
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + upgrade)
        answer = answer_of(connection)  # ends: the connection is of no further use
        assert answer[9:12] == b"200" and b"connection: close" in answer.lower()


def test_a_client_that_takes_nothing_is_cut() -> None:
    """Its answer is more than buffers hold; it never reads."""
    with served(echo_engine(max_model_len=2000, step_seconds=0.005), send_timeout=0.3) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(server._address)
        body = json.dumps(
            {"prompt": [7] * 9, "max_tokens": 1500, "n": 100, "ignore_eos": True, "stream": True}
        ).encode()
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        wait_until(lambda: "send_timeout" in server.reasons, 30)
        wait_until(lambda: not server.edge.engine.running, 10)
        assert server.is_well()
        connection.close()
