"""awq-bench against the edge over an echoing engine, and against servers that lack what it likes to use."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from server import bench
from server.bench import format_table, percentile, summarize
from server.load import Sample, Workload, make_requests
from server.sse_client import ClientError, SseClient
from tests.server.fakes import Edge, echo_engine, served_edge, wait_until


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, dict[str, Any]]:
    code = bench.main(arguments)
    output = capsys.readouterr().out
    return code, output, json.loads(output.splitlines()[-1])


def test_closed_loop(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--num-prompts", "9", "--concurrency", "3", "--input-len", "20", "--output-len", "10")
    most = 0

    def watch() -> None:
        nonlocal most
        most = max(most, len(engine.running))

    engine = echo_engine(step_seconds=0.002)
    engine.before_step = watch
    with served_edge(engine) as (url, edge):
        code, output, summary = run(capsys, url, *flags)
        requests = edge.engine.submitted[1:]  # the first one probes
    assert code == 0
    assert most == 3
    assert (summary["num_requests"], summary["num_failed"], summary["num_short"]) == (9, 0, 0)
    assert (summary["prompt_tokens"], summary["output_tokens"], summary["cached_tokens"]) == (180, 90, 171)
    assert summary["model"] == "echo"
    assert summary["output_tokens_per_second"] == pytest.approx(90 / summary["seconds"], rel=0.01)
    assert 0 < summary["ttft_ms"]["p50"] <= summary["ttft_ms"]["p99"] <= summary["e2e_ms"]["p99"]
    assert summary["itl_ms"]["mean"] > 0
    assert len({tuple(request.prompt_token_ids) for request in requests}) == 9
    assert all(len(request.prompt_token_ids) == 20 and request.sampling.ignore_eos for request in requests)
    assert "time to first token" in output


def test_open_loop_does_not_wait_for_answers(capsys: pytest.CaptureFixture[str]) -> None:
    engine = echo_engine()
    edges: list[Edge] = []
    have_all_come = False

    def wait_for_all() -> None:
        """No answer before all six requests have come: in a closed loop they never would."""
        nonlocal have_all_come
        if len(engine.submitted) > 1 and not have_all_come:  # the first one is the probe
            wait_until(lambda: edges[0].client.num_unfinished == 6)
            have_all_come = True

    engine.before_step = wait_for_all
    flags = ("--num-prompts", "6", "--request-rate", "200", "--input-len", "8", "--output-len", "4")
    with served_edge(engine) as (url, edge):
        edges.append(edge)
        code, _, summary = run(capsys, url, *flags)
    assert code == 0
    assert have_all_come
    assert summary["concurrency"] is None
    assert summary["output_tokens"] == 24


def test_text_prompts_and_shared_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    with served_edge(echo_engine(max_model_len=4096)) as (url, _):
        flags = ("--prompt-format", "text", "--num-prompts", "2", "--input-len", "30", "--output-len", "5")
        code, _, summary = run(capsys, f"{url}/v1/", *flags)
        assert code == 0
        assert summary["prompt_tokens"] >= 60


def test_failures_are_counted_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    with served_edge(echo_engine(max_model_len=64)) as (url, _):
        code, _, summary = run(capsys, url, "--num-prompts", "2", "--input-len", "100")
        assert code == 1
        assert (summary["num_failed"], summary["ttft_ms"]) == (2, None)


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("awq-bench: error: cannot list the models of http://127.0.0.1:9")


@pytest.mark.parametrize(
    "flags",
    [
        ("--concurrency", "0"),
        ("--num-prompts", "x"),
        ("--length-spread", "2"),
        ("--shared-prefix-len", "128"),
        ("--nope",),
    ],
)
def test_wrong_options_exit_2(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["http://127.0.0.1:9", *flags])
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


@contextmanager
def plain_server(refused: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that sends no usage and refuses one field by name."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, json.dumps({"data": [{"id": "plain"}]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if refused in body:
                self._answer(400, json.dumps({"error": {"message": f"{refused} is unknown"}}))
                return
            bodies.append(body)
            chunks = [{"choices": [{"text": "x", "finish_reason": None}]}] * (body["max_tokens"] - 1)
            chunks.append({"choices": [{"text": "x", "finish_reason": "length"}]})
            events = [f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks]
            self._answer(200, ": comment\n\n" + "".join(events) + "data: [DONE]\n\n")

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("refused", ["ignore_eos", "stream_options"])
def test_fields_that_a_server_refuses_are_left_out(refused: str, capsys: pytest.CaptureFixture[str]) -> None:
    with plain_server(refused) as (url, bodies):
        code, _, summary = run(capsys, url, "--num-prompts", "3", "--output-len", "7")
    assert code == 0
    assert (summary["output_tokens"], summary["prompt_tokens"]) == (21, 0)
    assert all(refused not in body for body in bodies)
    assert all(max(body["prompt"]) < 30_000 for body in bodies)


def test_requests_are_repeatable_and_distinct() -> None:
    workload = Workload(num_prompts=20, input_len=50, output_len=30, length_spread=0.2, shared_prefix_len=10, seed=4)
    requests = make_requests(workload, 1000)
    assert requests == make_requests(workload, 1000)
    assert len({str(prompt[10:]) for prompt, _ in requests}) == 20
    assert len({str(prompt[:10]) for prompt, _ in requests}) == 1
    assert all(40 <= len(prompt) <= 60 and 24 <= output <= 36 for prompt, output in requests)
    assert all(100 <= token < 900 for prompt, _ in requests for token in prompt)  # type: ignore[operator]


def test_summary_of_known_samples() -> None:
    good = Sample(10.0, [10.5, 10.6, 10.8], 11.0, 5, 3, 2, 3)
    short = Sample(10.0, [10.1], 10.2, 5, 1, 0, 3)
    failed = Sample(10.0, [], 10.2, error="HTTP 500")
    summary = summarize([good, short, failed], 2.0)
    assert (summary["num_failed"], summary["num_short"], summary["cached_tokens"]) == (1, 1, 2)
    assert (summary["requests_per_second"], summary["output_tokens_per_second"]) == (1.0, 2.0)
    assert summary["ttft_ms"] == {"mean": 300.0, "p50": 300.0, "p90": 460.0, "p99": 496.0}
    assert summary["itl_ms"]["mean"] == 150.0
    assert summary["tpot_ms"]["mean"] == 150.0
    assert "1 requests got fewer tokens" in format_table(summary)


def test_percentile_interpolates() -> None:
    assert percentile([4, 1, 2, 3], 50) == 2.5
    assert percentile([7], 99) == 7


@contextmanager
def scripted_server(answer: bytes, keep_open: bool = False) -> Iterator[str]:
    """Sends `answer` to every connection once it has read a request, then hangs up, or does not."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                while b"\r\n\r\n" not in connection.recv(65536):
                    pass
                connection.sendall(answer)
                if keep_open:
                    done.wait(10)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            thread.join()


async def payloads(url: str, timeout: float = 5.0) -> list[bytes]:
    return [payload async for payload in SseClient(url, {}, timeout).post("/x", b"")]


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"


def test_events_may_be_cut_anywhere() -> None:
    plain = b'HTTP/1.0 200 OK\r\n\r\ndata: {"a"\r\n\r\n: ping\n\ndata: b\n\ndata: [DONE]\n\n'
    chunked = HEAD + b'5;x=y\r\ndata:\r\n9\r\n {"a"\r\n\r\n\r\n13\r\n: ping\n\ndata: b\n\nda\r\n0\r\n\r\n'
    for answer in (plain, chunked):
        with scripted_server(answer) as url:
            assert asyncio.run(payloads(url)) == [b'{"a"', b"b"]


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (HEAD + b"20\r\ndata: a\n", "in the middle of its answer"),
        (HEAD + b"zz\r\ndata: a\n", "ValueError"),
        (b"", "in the middle of its answer"),
        (b"HTTP/1.1 418 Teapot\r\n\r\nshort and stout", "HTTP 418: short and stout"),
    ],
)
def test_broken_answers_are_named(answer: bytes, part: str) -> None:
    with scripted_server(answer) as url, pytest.raises(ClientError, match=part):
        asyncio.run(payloads(url))


def test_silence_is_named() -> None:
    with scripted_server(HEAD, keep_open=True) as url, pytest.raises(ClientError, match=r"nothing came for 0\.1 s"):
        asyncio.run(payloads(url, 0.1))
    with pytest.raises(ClientError, match="ftp://x"):
        SseClient("ftp://x", {}, 1)
