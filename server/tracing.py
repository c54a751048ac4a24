"""OpenTelemetry traces: one span for each HTTP request that generates, where the extra [otel] is installed.

Attributes have the names of the conventions for generative AI. A client's `traceparent` makes its span the parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.record import Generated, RequestRecord
from server.types import RequestTimings

_SERVICE = "awq-serve"


class TracingUnavailable(Exception):
    """Traces are asked for, and cannot be had. One line says why."""


class Tracing:
    """Makes spans of ended requests and exports them in the background. `exporter`: instead of OTLP over HTTP, for tests."""

    def __init__(self, endpoint: str, version: str, exporter: Any = None) -> None:
        """Raises TracingUnavailable where OpenTelemetry's SDK is not installed."""
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=endpoint)
        except ImportError as error:
            raise TracingUnavailable(
                f"--otlp-traces-endpoint needs OpenTelemetry: pip install 'awq-serve[otel]' ({error})"
            ) from None
        # The environment's OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before these.
        resource = Resource({"service.name": _SERVICE, "service.version": version}).merge(Resource.create())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("awq-serve", version)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, record: RequestRecord) -> None:
        """A recorder of requests: exports the span of one that got as far as to ask the model."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        if record.generated is None:
            return
        generated = record.generated()
        begin = int(record.start_time * 1e9)
        span = self._tracer.start_span(
            f"{generated.operation} {generated.model}",
            context=self._propagator.extract(record.traceparent),
            kind=SpanKind.SERVER,
            start_time=begin,
            attributes=_attributes(record, generated),
        )
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, f"HTTP {record.status}"))
        elif "error" in generated.finish_reasons:
            span.set_status(Status(StatusCode.ERROR, "the model's answer ended in an error"))
        span.end(begin + int(record.seconds * 1e9))

    def close(self) -> None:
        """Exports what waits, and ends the background thread."""
        self._provider.shutdown()


def _attributes(record: RequestRecord, generated: Generated) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": generated.operation,
        "gen_ai.provider.name": _SERVICE,
        "gen_ai.request.model": generated.model,
        "gen_ai.response.model": generated.model,
        "gen_ai.response.id": generated.response_id,
        "gen_ai.usage.input_tokens": generated.num_prompt_tokens,
        "gen_ai.usage.output_tokens": generated.num_output_tokens,
        "http.request.method": record.method,
        "http.route": record.route or "",
        "http.response.status_code": record.status,
        "http.request.header.x-request-id": [record.request_id],
    }
    attributes |= {f"gen_ai.request.{name}": value for name, value in generated.parameters.items()}
    if generated.finish_reasons:
        attributes["gen_ai.response.finish_reasons"] = list(generated.finish_reasons)
    if generated.timings:
        attributes |= _latencies(generated.timings)
    return attributes


def _latencies(timings: Sequence[RequestTimings]) -> dict[str, float]:
    """Of all choices together, in seconds, by vLLM's names."""
    arrival = min(times.arrival for times in timings)
    latencies = {"gen_ai.latency.e2e": max(times.finished for times in timings) - arrival}
    scheduled = [times.first_scheduled for times in timings if times.first_scheduled is not None]
    firsts = [times.first_token for times in timings if times.first_token is not None]
    if scheduled:
        latencies["gen_ai.latency.time_in_queue"] = min(scheduled) - arrival
    if firsts:
        latencies["gen_ai.latency.time_to_first_token"] = min(firsts) - arrival
    return latencies
