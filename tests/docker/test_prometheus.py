"""A real Prometheus scrapes a running server, answers every panel, evaluates every alert; promtool finds nothing to say."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.docker.monitoring import ALERTS, DOCKER, alert_queries, panel_queries
from tests.served import Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Prometheus: apt-get install prometheus"),
]
ADDRESS = "127.0.0.1:18764"


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of compose.yaml in a folder laid out as in its container."""
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(ALERTS, folder / "alerts.yaml")
    path = folder / "prometheus.yml"
    shutil.copy(DOCKER / "prometheus/prometheus.yaml", path)
    return path


def test_promtool_takes_configuration_and_rules(configuration: Path) -> None:
    checked = subprocess.run(["promtool", "check", "config", configuration], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "rules found" in checked.stdout


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[Server]:
    with Server(demo_model, "--kv-cache-memory-bytes", "100M") as running:
        yield running


def test_promtool_takes_the_metrics(server: Server) -> None:
    text = server.client.get("/metrics").text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert not (checked.stdout + checked.stderr) and checked.returncode == 0


def test_every_panel_is_answered(server: Server, configuration: Path) -> None:
    settings = yaml.safe_load(configuration.read_text(encoding="utf-8"))
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    settings["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    configuration.with_name("live.yml").write_text(yaml.safe_dump(settings))
    command = ["prometheus", f"--config.file={configuration.with_name('live.yml')}", f"--web.listen-address={ADDRESS}"]
    with open(configuration.with_name("log"), "w") as log:
        process = subprocess.Popen(
            [*command, f"--storage.tsdb.path={configuration.with_name('data')}"], stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://{ADDRESS}/api/v1", timeout=30) as client:
            _wait_for(client, "count_over_time(up[1m]) >= 3 and up == 1")
            for _ in range(4):  # rates need samples before and after
                server.complete("Water boils at a lower temperature on a mountain because", max_tokens=24)
            time.sleep(3)
            for title, query in panel_queries():
                values = [float(series["value"][1]) for series in _query(client, query)]
                assert values, f"{title}: no data for {query}"
                assert any(value == value for value in values), f"{title}: only NaN for {query}"
            groups = client.get("/rules").json()["data"]["groups"]
            rules = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
            assert rules == dict.fromkeys(alert_queries(), "ok")
            assert not client.get("/alerts").json()["data"]["alerts"]
    finally:
        process.terminate()
        process.wait(30)


def _query(client: httpx.Client, query: str) -> list[dict]:
    response = client.get("/query", params={"query": query})
    if response.status_code == 503:  # it is starting
        response.raise_for_status()
    answer = response.json()
    assert answer["status"] == "success", answer
    return answer["data"]["result"]


def _wait_for(client: httpx.Client, query: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if _query(client, query):
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, f"{query} has no answer"
        time.sleep(0.5)
