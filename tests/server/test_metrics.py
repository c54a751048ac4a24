"""The recorder against hand-made steps: counts, histograms and names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import MetricsRecorder, token_buckets
from server.types import (
    EngineInfo,
    FinishReason,
    GenerateRequest,
    RequestTimings,
    SamplingParams,
    StepOutput,
    StepStats,
    TokenEvent,
)

INFO = EngineInfo(0, 1000, 40, 16, "reference")


class _Recorded:
    """A recorder with a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.recorder = MetricsRecorder(CollectorRegistry(), "demo", INFO, clock=lambda: self.now)

    def submit(self, name: str, num_prompt_tokens: int, max_tokens: int = 10) -> None:
        self.recorder.on_submit(GenerateRequest(name, [1] * num_prompt_tokens, SamplingParams(max_tokens), self.now))

    def step(self, now: float, *events: TokenEvent, **stats: Any) -> None:
        self.now = now
        counts = {"num_running": 0, "num_waiting": 0, "num_blocks": 40, "num_used_blocks": 0, "num_cached_blocks": 0}
        self.recorder.on_step(StepOutput(0, list(events), StepStats(**(counts | stats))))

    def values(self) -> dict[str, float]:
        """Sample name to value; the values of labels other than the model's stand in brackets, by the labels' names."""
        values = {}
        body, content_type = self.recorder.render()
        assert content_type.startswith("text/plain")
        for family in text_string_to_metric_families(body.decode()):
            for sample in family.samples:
                labels = dict(sample.labels)
                if sample.name.startswith("awqserve_"):
                    assert labels.pop("model_name") == "demo", sample.name
                    assert labels.pop("engine", "0") == "0"
                extra = ",".join(value for _, value in sorted(labels.items()))
                values[sample.name + (f"[{extra}]" if extra else "")] = sample.value
        return values


def test_a_requests_life() -> None:
    recorded = _Recorded()
    recorded.submit("a", 20)
    recorded.step(101.0, TokenEvent("a", [5], num_cached_tokens=16), num_running=1, num_used_blocks=10, num_prompt_tokens=20,
                  num_generation_tokens=1, num_prefix_queries=20, num_prefix_hits=16)  # fmt: skip
    recorded.step(101.06, TokenEvent("a", [6], 16), num_running=1, num_used_blocks=10, num_generation_tokens=1)
    timings = RequestTimings(100.0, 100.4, 101.0, 101.2, 1)
    last = TokenEvent("a", [7, 8], 16, FinishReason.LENGTH, timings=timings)
    recorded.step(101.2, last, num_waiting=3, num_preemptions=1, num_generation_tokens=2)
    values = recorded.values()
    expected = {
        "awqserve_prompt_tokens_total": 20,
        "awqserve_prompt_tokens_cached_total": 16,
        "awqserve_generation_tokens_total": 4,
        "awqserve_prefix_cache_queries_total": 20,
        "awqserve_prefix_cache_hits_total": 16,
        "awqserve_num_preemptions_total": 1,
        "awqserve_num_requests_running": 0,
        "awqserve_num_requests_waiting": 3,
        "awqserve_kv_cache_usage_perc": 0,
        "awqserve_request_success_total[length]": 1,
        "awqserve_request_success_total[stop]": 0,
        "awqserve_time_to_first_token_seconds_sum": 1.0,
        "awqserve_time_to_first_token_seconds_count": 1,
        "awqserve_inter_token_latency_seconds_sum": 0.2,
        "awqserve_inter_token_latency_seconds_count": 3,
        "awqserve_inter_token_latency_seconds_bucket[0.05]": 0,
        "awqserve_inter_token_latency_seconds_bucket[0.075]": 3,
        "awqserve_e2e_request_latency_seconds_sum": 1.2,
        "awqserve_request_queue_time_seconds_sum": 0.4,
        "awqserve_request_prefill_time_seconds_sum": 0.6,
        "awqserve_request_decode_time_seconds_sum": 0.2,
        "awqserve_request_inference_time_seconds_sum": 0.8,
        "awqserve_request_time_per_output_token_seconds_sum": 0.2 / 3,
        "awqserve_request_prompt_tokens_sum": 20,
        "awqserve_request_generation_tokens_sum": 4,
        "awqserve_request_params_max_tokens_sum": 10,
        "awqserve_iteration_tokens_count": 3,
        "awqserve_iteration_tokens_sum": 24,
        "awqserve_cache_config_info[16,reference,40]": 1,
    }
    for name, value in expected.items():
        found = values.get(name)
        assert found is not None, name
        assert abs(found - value) < 1e-9, (name, found, value)
    assert not any(name.endswith("_created") for name in values)


def test_drafts_are_counted_by_position() -> None:
    recorded = _Recorded()
    recorded.step(101, num_drafts=2, num_draft_tokens=7, num_accepted_per_position=[2, 1])
    recorded.step(102, num_drafts=1, num_draft_tokens=3, num_accepted_per_position=[1])
    values = {name: value for name, value in recorded.values().items() if "spec_decode" in name}
    assert values == {
        "awqserve_spec_decode_num_drafts_total": 3,
        "awqserve_spec_decode_num_draft_tokens_total": 10,
        "awqserve_spec_decode_num_accepted_tokens_total": 4,
        "awqserve_spec_decode_num_accepted_tokens_per_pos_total[0]": 3,
        "awqserve_spec_decode_num_accepted_tokens_per_pos_total[1]": 1,
    }


def test_gauges_follow_the_last_step() -> None:
    recorded = _Recorded()
    recorded.step(101, num_running=2, num_waiting=1, num_used_blocks=10)
    values = recorded.values()
    assert values["awqserve_kv_cache_usage_perc"] == 0.25
    assert values["awqserve_num_requests_running"] == 2
    assert values["awqserve_num_requests_waiting"] == 1


def test_every_way_to_end_is_counted_once() -> None:
    recorded = _Recorded()
    for reason in FinishReason:
        recorded.submit(reason.value, 5)
        recorded.step(101, TokenEvent(reason.value, [], finish_reason=reason))
        recorded.step(102, TokenEvent(reason.value, [], finish_reason=reason))  # told twice
    values = recorded.values()
    for reason in FinishReason:
        assert values[f"awqserve_request_success_total[{reason.value}]"] == 1
    assert values["awqserve_time_to_first_token_seconds_count"] == 0


def test_requests_lost_with_the_engine_are_errors_and_gauges_return_to_zero() -> None:
    recorded = _Recorded()
    recorded.submit("a", 5)
    recorded.submit("b", 5)
    recorded.step(101, TokenEvent("a", [1]), num_running=2, num_used_blocks=4)
    recorded.recorder.on_lost(["a", "b", "unknown"])
    recorded.recorder.on_crash(3)
    recorded.recorder.on_start(replace(INFO, num_blocks=7), is_restart=True)
    recorded.recorder.on_start(replace(INFO, num_blocks=8), is_restart=False)
    recorded.recorder.on_refused()
    values = recorded.values()
    assert values["awqserve_request_success_total[error]"] == 2
    assert values["awqserve_num_requests_running"] == 0
    assert values["awqserve_kv_cache_usage_perc"] == 0
    for name, count in (("engine_restarts", 1), ("retried_requests", 3), ("refused_fingerprints", 1)):
        assert values[f"awqserve_{name}_total"] == count
    assert [name for name in values if name.startswith("awqserve_cache_config_info")] == [
        "awqserve_cache_config_info[16,reference,8]"
    ]


def test_numbers_that_are_none_are_counted() -> None:
    recorded = _Recorded()
    recorded.submit("a", 5)
    recorded.submit("b", 5)
    last = TokenEvent("a", [], finish_reason=FinishReason.ERROR, error="not finite", is_non_finite=True)
    recorded.step(101, last, TokenEvent("b", [1]))
    values = recorded.values()
    assert values["awqserve_non_finite_logits_total"] == values["awqserve_request_success_total[error]"] == 1


def test_a_request_aborted_while_it_waited_counts_its_wait_alone() -> None:
    recorded = _Recorded()
    recorded.submit("a", 5)
    timings = RequestTimings(100.0, None, None, 103.0, 0)
    recorded.step(103, TokenEvent("a", [], finish_reason=FinishReason.ABORT, timings=timings))
    values = recorded.values()
    assert values["awqserve_request_queue_time_seconds_sum"] == 3
    assert values["awqserve_e2e_request_latency_seconds_sum"] == 3
    assert values["awqserve_request_inference_time_seconds_count"] == 0
    assert values["awqserve_prompt_tokens_total"] == 0


def test_token_buckets() -> None:
    assert token_buckets(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert token_buckets(60) == [1, 2, 5, 10, 20, 50]
