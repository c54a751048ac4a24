"""Prometheus metrics of the engine's steps and the finished requests, with vLLM's names under the prefix `awqserve_`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from server.types import (
    EngineInfo,
    FinishReason,
    GenerateRequest,
    PoolRequest,
    RequestTimings,
    StepOutput,
    StepStats,
    TokenEvent,
)

PREFIX = "awqserve_"

# vLLM's buckets, so that its dashboards read the same.
_REQUEST_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_STEP_TOKENS = tuple(2**exponent if exponent else 1 for exponent in (0, *range(3, 15)))


def token_buckets(largest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `largest`."""
    buckets = []
    decade = 1
    while decade <= largest:
        buckets += [decade * step for step in (1, 2, 5) if decade * step <= largest]
        decade *= 10
    return buckets


@dataclass(slots=True)
class _Live:
    """A request that the engine has not finished."""

    num_prompt_tokens: int
    max_tokens: int | None  # None: to be embedded
    num_tokens: int = 0
    last_token_time: float | None = None


class MetricsRecorder:
    """An `EngineObserver` that counts. All methods belong to one thread; each takes microseconds per event."""

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: str,
        info: EngineInfo,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        disable_created_metrics()  # the *_created series double the page and vLLM's dashboards do not use them
        self._registry = registry
        self._model_name = model_name
        self._clock = clock
        self._live: dict[str, _Live] = {}
        self._make_engine_metrics(info)
        self._make_request_metrics(info)

    def render(self) -> tuple[bytes, str]:
        """The body and content type of /metrics."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def on_submit(self, request: GenerateRequest | PoolRequest) -> None:
        max_tokens = None if isinstance(request, PoolRequest) else request.sampling.max_tokens
        self._live[request.request_id] = _Live(len(request.prompt_token_ids), max_tokens)

    def on_step(self, output: StepOutput) -> None:
        now = self._clock()
        for event in output.events:
            live = self._live.get(event.request_id)
            if live is None:  # refused before it was known, or reported twice: not ours to count
                continue
            if event.token_ids or event.embedding is not None:
                self._count_tokens(live, event, now)
            if event.finish_reason is not None:
                del self._live[event.request_id]
                self._count_finished(live, event.finish_reason, event.timings)
        self._count_step(output.stats)

    def on_lost(self, request_ids: Iterable[str]) -> None:
        """The engine died with these."""
        for request_id in request_ids:
            live = self._live.pop(request_id, None)
            if live is not None:
                self._count_finished(live, FinishReason.ERROR, None)
        self.num_running.set(0)
        self.num_waiting.set(0)
        self.kv_cache_usage.set(0)

    def _count_tokens(self, live: _Live, event: TokenEvent, now: float) -> None:
        num_tokens = len(event.token_ids)
        if live.last_token_time is None:
            self.prompt_tokens.inc(live.num_prompt_tokens)
            self.prompt_tokens_cached.inc(event.num_cached_tokens)
        else:
            interval = (now - live.last_token_time) / num_tokens
            for _ in range(num_tokens):
                self.inter_token_latency.observe(interval)
        live.last_token_time = now
        live.num_tokens += num_tokens
        self.generation_tokens.inc(num_tokens)

    def _count_finished(self, live: _Live, reason: FinishReason, timings: RequestTimings | None) -> None:
        self.finished[reason].inc()
        self.request_prompt_tokens.observe(live.num_prompt_tokens)
        if live.max_tokens is not None:
            self.request_generation_tokens.observe(live.num_tokens)
            self.request_max_tokens.observe(live.max_tokens)
        if timings is None:
            return
        self.e2e_latency.observe(timings.finished - timings.arrival)
        if timings.first_scheduled is None:
            self.queue_time.observe(timings.finished - timings.arrival)
            return
        self.queue_time.observe(timings.first_scheduled - timings.arrival)
        self.inference_time.observe(timings.finished - timings.first_scheduled)
        if timings.first_token is None:
            return
        self.time_to_first_token.observe(timings.first_token - timings.arrival)
        self.prefill_time.observe(timings.first_token - timings.first_scheduled)
        decode_seconds = timings.finished - timings.first_token
        self.decode_time.observe(decode_seconds)
        if live.num_tokens > 1:
            self.time_per_output_token.observe(decode_seconds / (live.num_tokens - 1))

    def _count_step(self, stats: StepStats) -> None:
        self.num_running.set(stats.num_running)
        self.num_waiting.set(stats.num_waiting)
        self.kv_cache_usage.set(stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0)
        self.prefix_cache_queries.inc(stats.num_prefix_queries)
        self.prefix_cache_hits.inc(stats.num_prefix_hits)
        self.num_preemptions.inc(stats.num_preemptions)
        if stats.num_drafts:
            self._count_drafts(stats)
        num_tokens = stats.num_prompt_tokens + stats.num_generation_tokens
        if num_tokens:
            self.iteration_tokens.observe(num_tokens)

    def _count_drafts(self, stats: StepStats) -> None:
        self.num_drafts.inc(stats.num_drafts)
        self.num_draft_tokens.inc(stats.num_draft_tokens)
        self.num_accepted_tokens.inc(sum(stats.num_accepted_per_position))
        for position, count in enumerate(stats.num_accepted_per_position):
            self.num_accepted_per_position.labels(self._model_name, str(position)).inc(count)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(PREFIX + name, help_text, ["model_name"], registry=self._registry).labels(self._model_name)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(PREFIX + name, help_text, ["model_name"], registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, help_text: str, buckets: Iterable[float]) -> Histogram:
        family = Histogram(
            PREFIX + name, help_text, ["model_name"], registry=self._registry, buckets=[float(edge) for edge in buckets]
        )
        return family.labels(self._model_name)

    def _make_engine_metrics(self, info: EngineInfo) -> None:
        self.num_running = self._gauge("num_requests_running", "Requests in the running batch.")
        self.num_waiting = self._gauge("num_requests_waiting", "Requests that wait to be scheduled.")
        self.kv_cache_usage = self._gauge("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed, cached ones included.")
        self.prompt_tokens_cached = self._counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.prefix_cache_queries = self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self.prefix_cache_hits = self._counter("prefix_cache_hits", "Tokens that the prefix cache held.")
        self.num_preemptions = self._counter("num_preemptions", "Times a running request had to make room.")
        self.iteration_tokens = self._histogram("iteration_tokens_total", "Tokens per engine step.", _STEP_TOKENS)
        self.num_drafts = self._counter("spec_decode_num_drafts", "Times that tokens were drafted for a sequence.")
        self.num_draft_tokens = self._counter("spec_decode_num_draft_tokens", "Tokens drafted.")
        self.num_accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that were right.")
        self.num_accepted_per_position = Counter(
            PREFIX + "spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were right, by their place in the draft.",
            ["model_name", "position"],
            registry=self._registry,
        )
        cache_config = Gauge(
            PREFIX + "cache_config_info",
            "The KV cache's layout; always 1.",
            ["model_name", "block_size", "num_blocks", "kernel_backend"],
            registry=self._registry,
        )
        cache_config.labels(self._model_name, str(info.block_size), str(info.num_blocks), info.backend).set(1)

    def _make_request_metrics(self, info: EngineInfo) -> None:
        family = Counter(
            PREFIX + "request_success",
            "Finished requests by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self.finished = {reason: family.labels(self._model_name, reason.value) for reason in FinishReason}
        tokens = token_buckets(info.max_model_len)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens per request.", tokens)
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens per request.", tokens
        )
        self.request_max_tokens = self._histogram("request_params_max_tokens", "max_tokens of requests.", tokens)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN_SECONDS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Time between tokens of a request.", _TOKEN_SECONDS
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", _TOKEN_SECONDS
        )
        self.e2e_latency = self._histogram("e2e_request_latency_seconds", "Arrival to end.", _REQUEST_SECONDS)
        self.queue_time = self._histogram("request_queue_time_seconds", "Arrival to first step.", _REQUEST_SECONDS)
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "First step to first token.", _REQUEST_SECONDS
        )
        self.decode_time = self._histogram("request_decode_time_seconds", "First token to end.", _REQUEST_SECONDS)
        self.inference_time = self._histogram("request_inference_time_seconds", "First step to end.", _REQUEST_SECONDS)
