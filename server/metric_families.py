"""Metric families of one registry under one prefix, with the labels that all have. Whoever counts asks here for a family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

PREFIX = "awqserve_"

# vLLM's buckets, so that its dashboards read the same.
REQUEST_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
STEP_TOKENS = tuple(2**exponent if exponent else 1 for exponent in (0, *range(3, 15)))
NUM_CHOICES = (1, 2, 5, 10, 20)
NUM_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)


def token_buckets(largest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `largest`."""
    buckets = []
    decade = 1
    while decade <= largest:
        buckets += [decade * step for step in (1, 2, 5) if decade * step <= largest]
        decade *= 10
    return buckets


def render(registry: CollectorRegistry) -> tuple[bytes, str]:
    """The body and content type of /metrics."""
    return generate_latest(registry), CONTENT_TYPE_LATEST


class MetricFamilies:
    """Makes metrics with the labels `model_name` and `engine` filled in, as vLLM has them."""

    def __init__(self, registry: CollectorRegistry, model_name: str, prefix: str = PREFIX) -> None:
        disable_created_metrics()  # the *_created series double the page and vLLM's dashboards do not use them
        self.registry = registry
        self.prefix = prefix
        self._common = {"model_name": model_name, "engine": "0"}

    @property
    def follows_vllm(self) -> bool:
        """Whether names are to be vLLM's even where Prometheus's rules would have another."""
        return self.prefix == "vllm:"

    def gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(self.prefix + name, help_text, list(self._common), registry=self.registry).labels(**self._common)

    def counter(self, name: str, help_text: str) -> Counter:
        return Counter(self.prefix + name, help_text, list(self._common), registry=self.registry).labels(**self._common)

    def counters(
        self, name: str, help_text: str, label: str, values: Iterable[str], *, of_engine: bool = True
    ) -> dict[str, Counter]:
        """A counter for each value of one more label, all of them exported from the start."""
        common = self._common if of_engine else {"model_name": self._common["model_name"]}
        family = Counter(self.prefix + name, help_text, [*common, label], registry=self.registry)
        return {value: family.labels(**common, **{label: value}) for value in values}

    def counters_on_demand(self, name: str, help_text: str, label: str) -> Callable[[str], Counter]:
        """The counter for a value of one more label; those that were never asked for are not exported."""
        family = Counter(self.prefix + name, help_text, [*self._common, label], registry=self.registry)
        return lambda value: family.labels(**self._common, **{label: value})

    def gauges(self, name: str, help_text: str, label: str, values: Iterable[str]) -> dict[str, Gauge]:
        family = Gauge(self.prefix + name, help_text, [*self._common, label], registry=self.registry)
        return {value: family.labels(**self._common, **{label: value}) for value in values}

    def histogram(self, name: str, help_text: str, buckets: Iterable[float]) -> Histogram:
        family = Histogram(
            self.prefix + name,
            help_text,
            list(self._common),
            registry=self.registry,
            buckets=[float(edge) for edge in buckets],
        )
        return family.labels(**self._common)

    def info(self, name: str, help_text: str, facts: Mapping[str, str]) -> None:
        """A gauge that is always 1 and says something by its labels."""
        family = Gauge(self.prefix + name, help_text, [*self._common, *facts], registry=self.registry)
        family.labels(**self._common, **facts).set(1)

    def changing_info(self, name: str, help_text: str, labels: Iterable[str]) -> Callable[[Mapping[str, str]], None]:
        """The same for what changes: call what is returned with the facts whenever they do."""
        family = Gauge(self.prefix + name, help_text, [*self._common, *labels], registry=self.registry)

        def tell(facts: Mapping[str, str]) -> None:
            family.clear()
            family.labels(**self._common, **facts).set(1)

        return tell
