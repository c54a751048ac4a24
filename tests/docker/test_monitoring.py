"""Dashboard and alerts ask for metrics and labels that the server exports, and the operations page tells all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import promql_parser
import pytest

from server.metric_families import PREFIX
from server.options import GROUPS
from tests.docker.monitoring import (
    DASHBOARD,
    DOCKER,
    alert_queries,
    dashboard_variables,
    exported_samples,
    panel_queries,
)

PAGE = (DOCKER.parent / "docs/operations.md").read_text(encoding="utf-8")
# What Prometheus adds to every target.
SCRAPE_LABELS = {"job", "instance"}
SCRAPE_SAMPLES = {"up": set()}


def _selectors(expression: object) -> Iterator[promql_parser.VectorSelector]:
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "vs", "args", "param"):
        child = getattr(expression, name, None)
        for item in child if isinstance(child, list) else [child]:
            if item is not None:
                yield from _selectors(item)


def _grouping_labels(expression: object) -> Iterator[str]:
    modifier = getattr(expression, "modifier", None)
    yield from getattr(modifier, "labels", None) or ()
    for name in ("expr", "lhs", "rhs", "args"):
        child = getattr(expression, name, None)
        for item in child if isinstance(child, list) else [child]:
            if item is not None:
                yield from _grouping_labels(item)


@pytest.mark.parametrize("query", [*alert_queries().values(), *(query for _, query in panel_queries())])
def test_queries_ask_for_what_is_exported(query: str) -> None:
    samples = exported_samples() | SCRAPE_SAMPLES
    parsed = promql_parser.parse(query)
    selectors = list(_selectors(parsed))
    assert selectors and {selector.name for selector in selectors} == set(
        re.findall(rf"\b(?:{PREFIX}\w+|http_\w+|process_\w+|up)\b", query)
    ), "the walk over the expression misses a selector"
    labels = SCRAPE_LABELS.copy()
    for selector in selectors:
        assert selector.name in samples, f"{selector.name} is not exported"
        labels |= samples[selector.name]
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert matched <= samples[selector.name] | SCRAPE_LABELS, f"{selector.name} has no labels {matched}"
    assert set(_grouping_labels(parsed)) <= labels


def test_the_walk_sees_unknown_names() -> None:
    names = [
        selector.name for selector in _selectors(promql_parser.parse("sum by (x) (rate(a[1m])) / -b > (c offset 1m)"))
    ]
    assert sorted(names) == ["a", "b", "c"]


def test_dashboard_variables_exist() -> None:
    assert dashboard_variables() and set(dashboard_variables()) <= exported_samples().keys()


def test_panels_are_apart() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for position in (panel["gridPos"] for panel in panels)
        for x in range(position["x"], position["x"] + position["w"])
        for y in range(position["y"], position["y"] + position["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_the_page_lists_every_metric_alert_and_option() -> None:
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported_samples() if name.startswith(PREFIX)}
    listed = set(re.findall(rf"^\| `({PREFIX}\w+)`", PAGE, re.MULTILINE))
    assert listed == families
    assert set(re.findall(r"^\| (AwqServe\w+)", PAGE, re.MULTILINE)) == alert_queries().keys()
    options = {option.name for group in GROUPS.values() for option in group}
    assert set(re.findall(r"`--([a-z-]+)", PAGE)) <= options
