"""Spans: one for each request that asks the model, with the conventions' attributes, below the client's own."""

from __future__ import annotations

import asyncio
import builtins
import queue
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from server.api.app import Gate
from server.tracing import Tracing, TracingUnavailable
from tests.server.fakes import running_edge

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODY = {"prompt": "The dog", "max_tokens": 3, "temperature": 0.5, "n": 2}


def _spans(requests: list[tuple[str, dict[str, Any], dict[str, str]]]) -> tuple[Any, ...]:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    tracing = Tracing("http://unused", "1.2", exporter)

    async def check() -> None:
        async with running_edge(gate=Gate(recorders=(tracing.record,))) as edge:
            for path, body, headers in requests:
                await edge.http.post(path, json=body, headers=headers)
            await edge.http.get("/v1/models")

    asyncio.run(check())
    tracing._provider.force_flush()
    spans = exporter.get_finished_spans()
    tracing.close()
    return spans


def test_a_span_tells_the_request() -> None:
    messages = [{"role": "user", "content": "secret words"}]
    spans = _spans(
        [
            ("/v1/completions", BODY, {"traceparent": PARENT, "X-Request-Id": "my-id"}),
            ("/v1/chat/completions", {"messages": messages, "max_tokens": 2, "stream": True}, {}),
            ("/v1/completions", {"prompt": 5}, {}),
        ]
    )
    assert [span.name for span in spans] == ["text_completion echo", "chat echo"]
    first, second = spans
    assert format(first.context.trace_id, "032x") == PARENT.split("-")[1]
    assert format(first.parent.span_id, "016x") == PARENT.split("-")[2] and second.parent is None
    attributes = dict(first.attributes)
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.request.model"] == attributes["gen_ai.response.model"] == "echo"
    assert attributes["gen_ai.request.max_tokens"] == 3 and attributes["gen_ai.request.temperature"] == 0.5
    assert attributes["gen_ai.request.choice.count"] == 2 and attributes["gen_ai.usage.output_tokens"] == 6
    assert attributes["gen_ai.usage.input_tokens"] > 0
    assert attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    assert attributes["http.response.status_code"] == 200 and attributes["http.route"] == "/v1/completions"
    assert attributes["http.request.header.x-request-id"] == ("my-id",)
    assert attributes["gen_ai.latency.e2e"] >= attributes["gen_ai.latency.time_to_first_token"] >= 0
    assert first.end_time > first.start_time > 1_600_000_000 * 10**9
    assert "secret" not in str(dict(second.attributes))


def test_spans_go_to_a_collector() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    received: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        tracing = Tracing(f"http://127.0.0.1:{collector.server_port}/v1/traces", "1.2")

        async def check() -> None:
            async with running_edge(gate=Gate(recorders=(tracing.record,))) as edge:
                await edge.http.post("/v1/completions", json=BODY)

        asyncio.run(check())
        tracing.close()
        path, body = received.get(timeout=10)
        collector.shutdown()
    assert path == "/v1/traces" and b"text_completion echo" in body and b"awq-serve" in body


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TracingUnavailable, match=r"--otlp-traces-endpoint needs .*awq-serve\[otel\]"):
        Tracing("http://collector:4318/v1/traces", "1.2")
