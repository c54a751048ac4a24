"""Metrics of what happens before the engine: HTTP requests, what was refused and why, and the compiling of grammars."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter, Histogram

from server.metric_families import MetricFamilies

REJECTIONS = ("max_num_queued_reqs", "max_num_queued_tokens", "key_requests_per_minute", "key_concurrent_requests")
REFUSALS = (
    *("unauthorized", "bad_request", "header_limit", "header_timeout", "body_limit", "body_timeout"),
    *("idle_timeout", "send_timeout", "too_many_connections", "evicted"),
)
# What probes, scrapers and pages ask all the time is not worth series of its own.
_UNCOUNTED_ROUTES = frozenset({"/metrics", "/live", "/health", "/ready", "/version", "/", "/static/{name}"})

_HTTP_SECONDS = (0.1, 0.5, 1, 5, 10, 30, 60, 300)
_COMPILE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class EdgeMetrics:
    """Of all models together where they are of HTTP, whose names are those that vLLM exports (without a prefix)."""

    def __init__(self, families: MetricFamilies) -> None:
        self._families = families
        self._rejections = families.counters(
            "admission_rejections",
            "Requests answered with 429, by the limit that they met.",
            "reason",
            REJECTIONS,
            of_engine=False,
        )
        self._refusals = families.counters(
            "http_refusals",
            "Requests and connections that were cut or turned away before they reached a route.",
            "reason",
            REFUSALS,
            of_engine=False,
        )
        self._grammar_compilations = families.counter("grammar_compilations", "Grammars compiled, failures included.")
        self._grammar_failures = families.counter("grammar_failures", "Grammars that could not be compiled.")
        self._grammar_cache_hits = families.counter("grammar_cache_hits", "Grammars that had been compiled before.")
        self._grammar_seconds = families.histogram(
            "grammar_compile_seconds", "Time to compile a grammar.", _COMPILE_SECONDS
        )
        self._requests = Counter(
            "http_requests", "HTTP requests by route.", ["handler", "method", "status"], registry=families.registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "HTTP requests from head to last byte, by route.",
            ["handler", "method"],
            registry=families.registry,
            buckets=_HTTP_SECONDS,
        )

    def watch(self, num_connections: Callable[[], float], num_queued_tokens: Callable[[], float]) -> None:
        """What is asked when the page of metrics is made."""
        self._families.gauge("http_connections", "Open connections.").set_function(num_connections)
        self._families.gauge(
            "num_prompt_tokens_waiting", "Prompt tokens of requests without a first token."
        ).set_function(num_queued_tokens)

    def on_refused(self, reason: str) -> None:
        """One of REJECTIONS or REFUSALS."""
        counter = self._rejections.get(reason) or self._refusals[reason]
        counter.inc()

    def on_http(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """`status` 0: the client left before its answer began. Statuses count by their hundreds."""
        if route in _UNCOUNTED_ROUTES:
            return
        handler = route or "none"
        self._requests.labels(handler, method, f"{(status or 499) // 100}xx").inc()
        self._seconds.labels(handler, method).observe(seconds)

    # -- GrammarObserver -----------------------------------------------------------------------------------------------

    def on_grammar_compiled(self, seconds: float, is_good: bool) -> None:
        self._grammar_compilations.inc()
        self._grammar_seconds.observe(seconds)
        if not is_good:
            self._grammar_failures.inc()

    def on_grammar_cached(self) -> None:
        self._grammar_cache_hits.inc()
