"""Prometheus metrics of the engine's steps and the finished requests, with vLLM's names under the prefix `awqserve_`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from server.metric_families import (
    FIRST_TOKEN_SECONDS,
    NUM_CHOICES,
    NUM_PREEMPTIONS,
    PREFIX,
    REQUEST_SECONDS,
    STEP_TOKENS,
    TOKEN_SECONDS,
    MetricFamilies,
    render,
    token_buckets,
)
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

__all__ = ["PREFIX", "MetricsRecorder", "token_buckets"]


@dataclass(slots=True)
class _Group:
    """The choices of one prompt."""

    num_choices: int = 0
    num_live: int = 0
    most_tokens: int = 0


@dataclass(slots=True)
class _Live:
    """A request that the engine has not finished."""

    num_prompt_tokens: int
    max_tokens: int | None  # None: to be embedded
    group: str
    num_tokens: int = 0
    num_cached_tokens: int = 0
    last_token_time: float | None = None


class MetricsRecorder:
    """An `EngineObserver` that counts. All methods belong to one thread; each takes microseconds per event.

    `facts`: of info metrics by name, what their labels say beyond the model's name. `families`: where others count, too.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: str,
        info: EngineInfo,
        clock: Callable[[], float] = time.monotonic,
        prefix: str = PREFIX,
        facts: Mapping[str, Mapping[str, str]] | None = None,
        families: MetricFamilies | None = None,
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._live: dict[str, _Live] = {}
        self._groups: dict[str, _Group] = {}
        self.families = families or MetricFamilies(registry, model_name, prefix)
        self._make_engine_metrics()
        self._make_request_metrics(info)
        told = dict(facts or {})
        self._cache_facts = dict(told.pop("cache_config_info", {}))
        self._note_cache_config = self._make_cache_config()
        self._note_cache_config(info)
        for name, labels in told.items():
            self.families.info(name, _INFO_HELP[name], labels)

    def _make_cache_config(self) -> Callable[[EngineInfo], None]:
        """What tells the layout, which another engine may have another of."""
        names = ["block_size", "num_gpu_blocks", "kernel_backend", *self._cache_facts]
        tell = self.families.changing_info("cache_config_info", _INFO_HELP["cache_config_info"], names)

        def note(info: EngineInfo) -> None:
            layout = {
                "block_size": str(info.block_size),
                "num_gpu_blocks": str(info.num_blocks),
                "kernel_backend": info.backend,
            }
            tell(layout | self._cache_facts)

        return note

    def render(self) -> tuple[bytes, str]:
        """The body and content type of /metrics."""
        return render(self._registry)

    def on_submit(self, request: GenerateRequest | PoolRequest) -> None:
        if isinstance(request, PoolRequest):
            self._live[request.request_id] = _Live(len(request.prompt_token_ids), None, "")
            return
        name = request.group_id or request.request_id
        group = self._groups.setdefault(name, _Group())
        group.num_choices += 1
        group.num_live += 1
        self._live[request.request_id] = _Live(len(request.prompt_token_ids), request.sampling.max_tokens, name)

    def on_step(self, output: StepOutput) -> None:
        now = self._clock()
        for event in output.events:
            live = self._live.get(event.request_id)
            if live is None:  # refused before it was known, or reported twice: not ours to count
                continue
            if event.token_ids or event.embedding is not None:
                self._count_tokens(live, event, now)
            self.non_finite_logits.inc(event.is_non_finite)
            if event.finish_reason is not None:
                del self._live[event.request_id]
                self._count_finished(live, event.finish_reason, event.timings)
        self._count_step(output.stats)

    def on_lost(self, request_ids: Iterable[str], reason: FinishReason = FinishReason.ERROR) -> None:
        """These ended without the engine saying so."""
        for request_id in request_ids:
            live = self._live.pop(request_id, None)
            if live is not None:
                self._count_finished(live, reason, None)

    def on_crash(self, num_retried: int) -> None:
        self.retried.inc(num_retried)
        self._clear_gauges()

    def on_start(self, info: EngineInfo, is_restart: bool) -> None:
        """The buckets of the first engine stay."""
        self._clear_gauges()
        self._note_cache_config(info)
        if is_restart:
            self.engine_restarts.inc()

    def on_refused(self) -> None:
        self.refused_fingerprints.inc()

    def _clear_gauges(self) -> None:
        self.num_running.set(0)
        self.num_waiting.set(0)
        for gauge in self.num_waiting_by_reason.values():
            gauge.set(0)
        self.kv_cache_usage.set(0)

    def _count_tokens(self, live: _Live, event: TokenEvent, now: float) -> None:
        num_tokens = len(event.token_ids)
        if live.last_token_time is None:
            live.num_cached_tokens = event.num_cached_tokens
            self.prompt_tokens.inc(live.num_prompt_tokens)
            self.prompt_tokens_cached.inc(event.num_cached_tokens)
            self.prompt_tokens_cached_by_source["device"].inc(event.num_cached_tokens)
            self.prompt_tokens_by_source["local_cache_hit"].inc(event.num_cached_tokens)
            self.prompt_tokens_by_source["local_compute"].inc(live.num_prompt_tokens - event.num_cached_tokens)
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
        if live.last_token_time is not None:
            self.request_prefill_computed.observe(live.num_prompt_tokens - live.num_cached_tokens)
        if live.max_tokens is not None:
            self.request_generation_tokens.observe(live.num_tokens)
            self.request_max_tokens.observe(live.max_tokens)
            self._count_group(live)
        if timings is None:
            return
        self.request_preemptions.observe(timings.num_preemptions)
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

    def _count_group(self, live: _Live) -> None:
        group = self._groups[live.group]
        group.num_live -= 1
        group.most_tokens = max(group.most_tokens, live.num_tokens)
        if not group.num_live:
            del self._groups[live.group]
            self.request_num_choices.observe(group.num_choices)
            self.request_most_generated.observe(group.most_tokens)

    def _count_step(self, stats: StepStats) -> None:
        self.num_running.set(stats.num_running)
        self.num_waiting.set(stats.num_waiting)
        self.num_waiting_by_reason["capacity"].set(stats.num_waiting)
        self.num_waiting_by_reason["deferred"].set(max(0, len(self._live) - stats.num_running - stats.num_waiting))
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
            self.num_accepted_at(str(position)).inc(count)

    def _make_engine_metrics(self) -> None:
        make = self.families
        self.num_running = make.gauge("num_requests_running", "Requests in the running batch.")
        self.num_waiting = make.gauge("num_requests_waiting", "Requests that wait to be scheduled.")
        self.num_waiting_by_reason = make.gauges(
            "num_requests_waiting_by_reason",
            "Requests that wait: for room in the batch, or deferred (on their way, or until their grammar is read).",
            "reason",
            ("capacity", "deferred"),
        )
        self.kv_cache_usage = make.gauge("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.")
        self.prompt_tokens = make.counter("prompt_tokens", "Prompt tokens processed, cached ones included.")
        self.prompt_tokens_by_source = make.counters(
            "prompt_tokens_by_source",
            "Prompt tokens by where their keys and values came from.",
            "source",
            ("local_compute", "local_cache_hit"),
        )
        self.prompt_tokens_cached = make.counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        self.prompt_tokens_cached_by_source = make.counters(
            "prompt_tokens_cached_by_source", "The same by where the cache was.", "source", ("device",)
        )
        self.generation_tokens = make.counter("generation_tokens", "Tokens generated.")
        self.prefix_cache_queries = make.counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self.prefix_cache_hits = make.counter("prefix_cache_hits", "Tokens that the prefix cache held.")
        self.num_preemptions = make.counter("num_preemptions", "Times a running request had to make room.")
        self.num_drafts = make.counter("spec_decode_num_drafts", "Times that tokens were drafted for a sequence.")
        self.num_draft_tokens = make.counter("spec_decode_num_draft_tokens", "Tokens drafted.")
        self.num_accepted_tokens = make.counter("spec_decode_num_accepted_tokens", "Drafted tokens that were right.")
        self.num_accepted_at = make.counters_on_demand(
            "spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were right, by their place in the draft.",
            "position",
        )
        self.num_accepted_at("0")  # exported from the start
        self.engine_restarts = make.counter("engine_restarts", "Engines started in place of one that crashed or hung.")
        # vLLM's name ends as only a counter's should; under a prefix of one's own it need not.
        name = "iteration_tokens_total" if make.follows_vllm else "iteration_tokens"
        self.iteration_tokens = make.histogram(name, "Tokens per engine step.", STEP_TOKENS)

    def _make_request_metrics(self, info: EngineInfo) -> None:
        make = self.families
        reasons = make.counters(
            "request_success",
            "Finished requests by reason.",
            "finished_reason",
            [reason.value for reason in FinishReason],
        )
        self.finished = {reason: reasons[reason.value] for reason in FinishReason}
        self.non_finite_logits = make.counter(
            "non_finite_logits", "Requests ended because the model's numbers were no numbers."
        )
        self.retried = make.counter("retried_requests", "Requests computed again after the engine crashed.")
        self.refused_fingerprints = make.counter(
            "refused_fingerprints", "Requests refused since they were running in several crashes."
        )
        tokens = token_buckets(info.max_model_len)
        self.request_prompt_tokens = make.histogram("request_prompt_tokens", "Prompt tokens per request.", tokens)
        self.request_prefill_computed = make.histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens per request that no cache held.", tokens
        )
        self.request_generation_tokens = make.histogram(
            "request_generation_tokens", "Generated tokens per request.", tokens
        )
        self.request_most_generated = make.histogram(
            "request_max_num_generation_tokens", "Generated tokens of a prompt's longest choice.", tokens
        )
        self.request_max_tokens = make.histogram("request_params_max_tokens", "max_tokens of requests.", tokens)
        self.request_num_choices = make.histogram("request_params_n", "Choices per prompt.", NUM_CHOICES)
        self.request_preemptions = make.histogram(
            "request_num_preemptions", "Times that a request had to make room.", NUM_PREEMPTIONS
        )
        self.time_to_first_token = make.histogram(
            "time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_SECONDS
        )
        self.inter_token_latency = make.histogram(
            "inter_token_latency_seconds", "Time between tokens of a request.", TOKEN_SECONDS
        )
        self.time_per_output_token = make.histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", TOKEN_SECONDS
        )
        self.e2e_latency = make.histogram("e2e_request_latency_seconds", "Arrival to end.", REQUEST_SECONDS)
        self.queue_time = make.histogram("request_queue_time_seconds", "Arrival to first step.", REQUEST_SECONDS)
        self.prefill_time = make.histogram(
            "request_prefill_time_seconds", "First step to first token.", REQUEST_SECONDS
        )
        self.decode_time = make.histogram("request_decode_time_seconds", "First token to end.", REQUEST_SECONDS)
        self.inference_time = make.histogram("request_inference_time_seconds", "First step to end.", REQUEST_SECONDS)


_INFO_HELP = {
    "cache_config_info": "The KV cache's layout; always 1.",
    "build_info": "What runs here; always 1.",
    "model_info": "What is served; always 1.",
}
