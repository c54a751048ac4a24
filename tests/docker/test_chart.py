"""The Helm chart: rendered by Helm's own library, held against the Kubernetes schemas; and the images' and compose's files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from server.options import parse_options
from tests.docker.monitoring import DOCKER

CHART = DOCKER / "helm/awq-serve"
ALL = {
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "options": {
        "max-model-len": 4096,
        "memory-utilization": 0.5,
        "kv-cache-memory-bytes": 2000000000,
        "access-log": True,
    },
    "model": {"subPath": "demo"},
    "apiKeys": {"secret": "awq-serve-keys"},
    "networkPolicy": {
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "egress": [{"ports": [{"port": 53, "protocol": "UDP"}]}],
    },
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "imagePullSecrets": [{"name": "pull"}],
    "podAnnotations": {"note": "x"},
}
KINDS = {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}
# Custom resources: no schema comes with Kubernetes.
CUSTOM = {"ServiceMonitor", "PrometheusRule"}


def _render(values: dict[str, Any], name: str = "demo") -> dict[str, dict[str, Any]]:
    """Kind to object."""
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name=name, namespace="models")
    objects = [item for text in files.values() for item in yaml.safe_load_all(text) if item]
    return {item["kind"]: item for item in objects}


@pytest.mark.parametrize("version", ["1.28", "1.32"])
@pytest.mark.parametrize(
    ("values", "kinds"), [({}, KINDS), (ALL, KINDS | CUSTOM | {"HorizontalPodAutoscaler"})], ids=["default", "all"]
)
def test_rendering_is_valid(values: dict[str, Any], kinds: set[str], version: str) -> None:
    objects = _render(values)
    assert objects.keys() == kinds
    for kind, item in objects.items():
        if kind not in CUSTOM:
            kubernetes_validate.validate(item, version, strict=True)


def test_lint() -> None:
    report = helm_python.lint(str(CHART), ALL, strict=True)
    assert report["total_charts_linted"] == 1 and not report["errors"]
    warnings = [message for message in report["messages"] if message["severity"] >= 2]
    assert not warnings, warnings


def test_selectors_and_ports_fit() -> None:
    objects = _render(ALL)
    pod = objects["Deployment"]["spec"]["template"]
    labels, container = pod["metadata"]["labels"], pod["spec"]["containers"][0]
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    monitored = objects["ServiceMonitor"]["spec"]
    assert monitored["selector"]["matchLabels"].items() <= objects["Service"]["metadata"]["labels"].items()
    assert monitored["endpoints"][0]["port"] in {port["name"] for port in objects["Service"]["spec"]["ports"]}
    names = {port["name"] for port in container["ports"]}
    assert {container[f"{probe}Probe"]["httpGet"]["port"] for probe in ("startup", "liveness", "readiness")} <= names
    paths = {probe: container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health", "liveness": "/live", "readiness": "/ready"}
    assert (
        objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        == objects["Deployment"]["metadata"]["name"]
    )
    assert "replicas" not in objects["Deployment"]["spec"]
    alerts = yaml.safe_load((CHART / "files/alerts.yaml").read_text(encoding="utf-8"))
    assert objects["PrometheusRule"]["spec"] == alerts


def test_the_server_takes_the_pods_environment() -> None:
    container = _render(ALL)["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    config = parse_options(["model"], {item["name"]: item["value"] for item in container["env"]})
    assert (config.engine.max_model_len, config.engine.memory_utilization) == (4096, 0.5)
    assert (config.engine.kv_cache_memory_bytes, config.access_log) == (2_000_000_000, True)
    assert config.drain_timeout == 30 and config.served_model_names == ("awq-serve",)
    assert config.metrics_port == 8001 and config.api_key_file == "/run/secrets/awq-serve/keys"


def test_the_keys_are_a_secrets_file() -> None:
    pod = _render(ALL)["Deployment"]["spec"]["template"]["spec"]
    [mount] = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "api-keys"]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == "api-keys"]
    assert volume["secret"] == {"secretName": "awq-serve-keys", "items": [{"key": "keys", "path": "keys"}]}
    environment = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
    assert environment["AWQSERVE_API_KEY_FILE"] == f"{mount['mountPath']}/keys" and mount["readOnly"]
    assert "api-keys" not in str(_render({})["Deployment"])


def test_the_metrics_port_has_peers_of_its_own() -> None:
    policy = _render(ALL)["NetworkPolicy"]["spec"]["ingress"]
    assert [[port["port"] for port in rule["ports"]] for rule in policy] == [["http"], ["metrics"]]
    assert policy[1]["from"] == ALL["networkPolicy"]["metricsFrom"]
    [rule] = _render({})["NetworkPolicy"]["spec"]["ingress"]
    assert rule["ports"] == [{"port": "http"}]


@pytest.mark.parametrize(
    ("release", "name"),
    [("demo", "demo-awq-serve"), ("my-awq-serve", "my-awq-serve"), ("x" * 53, "x" * 53 + "-awq-serve")],
)
def test_names_fit_and_hold_the_job(release: str, name: str) -> None:
    assert _render({}, release)["Service"]["metadata"]["name"] == name


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_hadolint_is_content(name: str) -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    assert hadolint is not None
    checked = subprocess.run([hadolint, DOCKER / name], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_compose_mounts_files_that_exist() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]
    mounts = [volume for service in services.values() for volume in service["volumes"]]
    files = [mount.split(":")[0] for mount in mounts if mount.startswith("./")]
    assert len(files) == 4 and all((DOCKER / file).exists() for file in files)
    environment = {name: value for name, value in services["server"]["environment"].items() if "${" not in value}
    config = parse_options(["model"], environment)
    assert config.drain_timeout == 30 and config.api_key_file == "/run/secrets/api-keys"
    prometheus = yaml.safe_load((DOCKER / "prometheus/prometheus.yaml").read_text(encoding="utf-8"))
    [target] = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == f"server:{config.metrics_port}"
