"""Short versions of `make soak` and `make abuse`, and what their figures stand on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.operate import abuse, soak
from tests.operate.attacks import ATTACKS
from tests.operate.processes import Growth, pss, slope_per_10_minutes


def test_slopes() -> None:
    growth = Growth("x")
    growth.samples = [(seconds, 1000 + (10 if seconds < 100 else seconds // 60)) for seconds in range(0, 1200, 5)]
    assert slope_per_10_minutes(growth, 120) == pytest.approx(10 / 1010.5, rel=0.02)
    growth.samples = [(seconds, 1000) for seconds in range(0, 1200, 5)]
    assert slope_per_10_minutes(growth, 0) == 0
    assert pss(__import__("os").getpid()) > 10**6


@pytest.mark.slow
def test_a_short_soak(demo_model: Path) -> None:
    """Memory is for the long one: it settles in minutes."""
    found = soak.run(demo_model, minutes=0.3, num_clients=20, num_requests=100, num_topics=4)
    assert not soak.check(found, most_growth=float("inf"))
    assert found["compared"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("part", ["slowloris", "JSON bombs", "header floods"])
def test_a_short_abuse(demo_model: Path, part: str) -> None:
    assert [name for name in ATTACKS if part in name]
    rows = abuse.run(demo_model, seconds=2, only=part, most=20)
    assert len(rows) == 2 and rows[1].num_requests > 0
