"""Listeners, keys, limits, metrics and TLS put together as `serve` does, over an engine without a model."""

from __future__ import annotations

import asyncio
import resource
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from server.api.context import ApiContext, ContextSource
from server.config import EngineConfig, ServerConfig
from server.edge_options import check_edge
from server.engine.client import EngineClient
from server.engine.process import thread_engine
from server.front import Front, FrontError
from server.http_server import max_connections, raise_descriptor_limit
from server.keys import load_keys
from server.model_config import ModelConfig
from server.options import parse_options
from server.tls import check_tls
from tests.server.fakes import byte_level_tokenizer, echo_engine

SECRET = "a-secret-of-some-length"
BODY = {"prompt": "The dog", "max_tokens": 2}
MODEL: Any = SimpleNamespace(model_type="llama", quantization=SimpleNamespace(method="awq", group_size=64))


@asynccontextmanager
async def running_front(config: ServerConfig) -> AsyncIterator[tuple[int, int | None]]:
    """The ports of the main listener and of that for metrics."""
    engine = echo_engine()
    client = EngineClient(lambda epoch: thread_engine(lambda: engine, epoch))
    info = await client.start()
    keys = load_keys(config.api_keys, config.api_key_file)
    model: ModelConfig = MODEL
    front = Front(config, keys)
    client.observer = front.observe(info, model)
    context = ApiContext(
        engine=client,
        tokenizer=byte_level_tokenizer(),
        model_names=config.served_model_names,
        vocab_size=400,
        render_metrics=front.render_metrics,
        created=0,
        max_request_bytes=config.max_request_bytes,
        admission=front.admission,
    )
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 if config.metrics_port is None else 2)]
    try:
        await front.start(
            ContextSource(client, "test", context), listeners[0], listeners[1] if len(listeners) == 2 else None
        )
        ports = [listener.getsockname()[1] for listener in listeners]
        yield ports[0], ports[1] if len(ports) == 2 else None
        await front.stop()
    finally:
        front.close()
        await client.stop()


def config(**fields: Any) -> ServerConfig:
    return ServerConfig(EngineConfig("m"), served_model_names=("echo",), **fields)


def test_the_metrics_port_needs_no_key_and_serves_nothing_else() -> None:
    async def check() -> None:
        settings = config(api_keys=(SECRET,), metrics_port=0)
        async with running_front(settings) as (port, metrics_port), httpx.AsyncClient() as http:
            main, aside = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}"
            assert (await http.get(f"{main}/metrics")).status_code == 401
            for path in ("/metrics", "/live", "/health", "/ready"):
                assert (await http.get(aside + path)).status_code == 200
            for path in ("/", "/v1/models", "/openapi.json", "/static/key.js", "/version", "/metrics/x"):
                assert (await http.get(aside + path)).status_code == 404
            assert (await http.post(f"{aside}/v1/completions", json=BODY)).status_code == 404
            headers = {"Authorization": f"Bearer {SECRET}"}
            assert (await http.post(f"{main}/v1/completions", json=BODY, headers=headers)).status_code == 200
            text = (await http.get(f"{aside}/metrics")).text
        assert 'awqserve_model_info{architecture="llama",engine="0",group_size="64",max_model_len="512"' in text
        assert 'quantization="awq"' in text and "awqserve_build_info{" in text
        assert 'awqserve_http_refusals_total{model_name="echo",reason="unauthorized"} 1.0' in text
        assert 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1.0' in text
        assert 'http_requests_total{handler="none",method="GET",status="4xx"} 1.0' in text
        assert 'awqserve_http_connections{engine="0",model_name="echo"} 1.0' in text

    asyncio.run(check())


def test_names_are_vllms_under_its_prefix() -> None:
    async def check() -> None:
        async with running_front(config(metrics_prefix="vllm:")) as (port, _), httpx.AsyncClient() as http:
            await http.post(f"http://127.0.0.1:{port}/v1/completions", json=BODY)
            text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
        labels = '{engine="0",model_name="echo"}'
        for sample in (
            f"vllm:num_requests_running{labels}", f"vllm:generation_tokens_total{labels} 2.0",
            f"vllm:iteration_tokens_total_count{labels}", f"vllm:kv_cache_usage_perc{labels}",
            'vllm:request_success_total{engine="0",finished_reason="length",model_name="echo"} 1.0',
            'vllm:admission_rejections_total{model_name="echo",reason="max_num_queued_reqs"} 0.0',
            f"vllm:request_params_n_count{labels} 1.0", f"vllm:request_max_num_generation_tokens_sum{labels} 2.0",
        ):  # fmt: skip
            assert sample in text, sample
        assert "awqserve_" not in text

    asyncio.run(check())


# -- TLS -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 127.0.0.1, signed by itself, with its key in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    key = file.with_name("key.pem")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", file], check=True, capture_output=True)
    file.write_text(file.read_text() + key.read_text())
    return file


def test_tls(certificate: Path) -> None:
    trust = ssl.create_default_context(cafile=str(certificate))

    async def check() -> None:
        async with running_front(config(ssl_certfile=str(certificate), header_timeout=0.5)) as (port, _):
            async with httpx.AsyncClient(verify=trust) as http:
                assert (await http.post(f"https://127.0.0.1:{port}/v1/completions", json=BODY)).status_code == 200
            async with httpx.AsyncClient() as http:
                with pytest.raises(httpx.HTTPError):
                    await http.get(f"http://127.0.0.1:{port}/live")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)  # and shakes no hands
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()

    asyncio.run(check())


def test_clients_with_certificates(certificate: Path) -> None:
    fields = {"ssl_certfile": str(certificate), "ssl_ca_certs": str(certificate), "metrics_port": 0}

    async def check() -> None:
        async with running_front(config(**fields)) as (port, metrics_port):
            with_one = ssl.create_default_context(cafile=str(certificate))
            with_one.load_cert_chain(certificate)
            async with httpx.AsyncClient(verify=with_one) as http:
                assert (await http.get(f"https://127.0.0.1:{port}/v1/models")).status_code == 200
            async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(certificate))) as http:
                with pytest.raises((httpx.HTTPError, ssl.SSLError)):
                    await http.get(f"https://127.0.0.1:{port}/v1/models")
                assert (await http.get(f"http://127.0.0.1:{metrics_port}/health")).status_code == 200

    asyncio.run(check())


def test_files_of_tls_are_tried_before_the_model_loads(certificate: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    check_tls(config(ssl_certfile=str(certificate), ssl_ca_certs=str(certificate)))
    for fields, part in (
        ({"ssl_certfile": "/nowhere.pem"}, "--ssl-certfile /nowhere.pem: no such file"),
        ({"ssl_certfile": str(junk)}, f"--ssl-certfile {junk}: no certificate"),
        ({"ssl_certfile": str(certificate), "ssl_ca_certs": str(junk)}, f"--ssl-ca-certs {junk}: no certificates"),
    ):
        with pytest.raises(ValueError, match=part.split(":")[0]):
            check_tls(config(**fields))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--ssl-keyfile", "x"], "--ssl-keyfile: needs --ssl-certfile"),
        (["--ssl-ca-certs", "x"], "--ssl-ca-certs: needs --ssl-certfile"),
        (["--allowed-origins", "*", "--allow-credentials"], "--allow-credentials: needs --allowed-origins by name"),
        (["--metrics-port", "8000"], "--metrics-port: 8000 is --port already"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        check_edge(parse_options(["m", *arguments], {}))


def test_traces_without_the_extra_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.resources", None)

    async def check() -> None:
        with pytest.raises(FrontError, match=r"awq-serve\[otel\]"):
            async with running_front(config(otlp_traces_endpoint="http://127.0.0.1:1/v1/traces")):
                pass

    asyncio.run(check())


def test_descriptors() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        raised = raise_descriptor_limit()
        assert raised == resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert max_connections(config(), 1024) == 1024 - 128
    assert max_connections(replace(config(), max_connections=10), 1024) == 10
