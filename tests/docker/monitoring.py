"""What the dashboard and the alert rules ask of Prometheus, and what the server exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from server.edge_metrics import EdgeMetrics
from server.metrics import MetricsRecorder
from server.types import EngineInfo

DOCKER = Path(__file__).parents[2] / "docker"
ALERTS = DOCKER / "helm/awq-serve/files/alerts.yaml"
DASHBOARD = DOCKER / "grafana/awq-serve.json"

# Grafana's variables, as its queries have them when all is chosen.
_VARIABLES = {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*"}


def alert_queries() -> dict[str, str]:
    """Alert name to PromQL."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def panel_queries() -> Iterator[tuple[str, str]]:
    """Panel title and PromQL, the variables filled in."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for variable, value in _VARIABLES.items():
                query = query.replace(variable, value)
            yield panel["title"], query


def dashboard_variables() -> list[str]:
    """The metrics that the dashboard's variables take their values from."""
    variables = json.loads(DASHBOARD.read_text(encoding="utf-8"))["templating"]["list"]
    queries = [variable["query"]["query"] for variable in variables if variable["type"] == "query"]
    return [re.fullmatch(r"label_values\((\w+), \w+\)", query).group(1) for query in queries]  # type: ignore[union-attr]


def exported_samples() -> dict[str, set[str]]:
    """Name of every sample on /metrics before the first request, to the names of its labels."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    facts: dict[str, dict[str, str]] = {"build_info": {}, "model_info": {}}
    recorder = MetricsRecorder(registry, "demo", EngineInfo(0, 1000, 40, 16, "reference"), facts=facts)
    EdgeMetrics(recorder.families).watch(lambda: 0, lambda: 0)
    body, _ = recorder.render()
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples
