"""What stands between the network and the routes, put together: listeners, access, admission, metrics, access log and traces."""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import socket
from collections.abc import Mapping
from dataclasses import replace

from prometheus_client import CollectorRegistry, ProcessCollector

from server.api.access import KeyLimits
from server.api.admission import Admission, Observers
from server.api.app import Cors, Gate, create_app, create_metrics_app
from server.api.context import ContextSource
from server.config import ServerConfig
from server.edge_metrics import EdgeMetrics
from server.engine.observer import EngineObserver
from server.http_server import HttpServer, http_server, make_guard
from server.keys import ApiKey
from server.logs import add_request_ids, log_access
from server.metric_families import MetricFamilies, render
from server.metrics import MetricsRecorder
from server.model_config import ModelConfig
from server.record import Recorder, RequestRecord, current_record
from server.tracing import Tracing, TracingUnavailable
from server.types import EngineInfo


class FrontError(Exception):
    """The listeners cannot start; one line says why."""


class Front:
    """Made before the engine is known, so that it can count from the first connection on; `observe` once it is.

    `start` listens, `stop` ends that once the requests have ended, `close` is for any case. Raises FrontError where what is asked
    for is not installed.
    """

    def __init__(self, config: ServerConfig, keys: tuple[ApiKey, ...]) -> None:
        self._config = config
        self._keys = keys
        self.version = _version()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._families = MetricFamilies(self._registry, config.served_model_names[0], config.metrics_prefix)
        self.edge_metrics = EdgeMetrics(self._families)  # of grammars, too: a GrammarObserver
        self.admission = Admission(
            config.max_queued_requests,
            config.max_queued_tokens,
            config.engine.max_num_seqs,
            self.edge_metrics.on_refused,
        )
        self._guard = make_guard(config, self.edge_metrics.on_refused)
        self.edge_metrics.watch(lambda: self._guard.num_connections, lambda: self.admission.num_queued_tokens)
        self._servers: list[tuple[HttpServer, asyncio.Future[None]]] = []
        self._tracing: Tracing | None = None
        if config.otlp_traces_endpoint is not None:
            try:
                self._tracing = Tracing(config.otlp_traces_endpoint, self.version)
            except TracingUnavailable as error:
                raise FrontError(str(error)) from error
        add_request_ids(_current_id)

    def observe(self, info: EngineInfo, model: ModelConfig) -> EngineObserver:
        """What the engine's client is to tell: admission and the metrics of the engine. Once."""
        recorder = MetricsRecorder(
            self._registry,
            self._config.served_model_names[0],
            info,
            facts=_facts(self._config, info, model, self.version),
            families=self._families,
        )
        return Observers(self.admission, recorder)

    def render_metrics(self) -> tuple[bytes, str]:
        return render(self._registry)

    async def start(
        self, source: ContextSource, listener: socket.socket, metrics_listener: socket.socket | None
    ) -> asyncio.Future[None]:
        """Listens. The future is done when the main server has ended."""
        app = create_app(source, self._gate())
        serving = await self._listen(http_server(self._config, app, self._guard, tls=True), listener)
        if metrics_listener is not None:
            # Its connections are few, and none of theirs may be lacking because of the others'.
            small = replace(self._guard.limits, max_connections=64)
            guard = type(self._guard)(small, self.edge_metrics.on_refused)
            server = http_server(self._config, create_metrics_app(source, self.render_metrics), guard, tls=False)
            await self._listen(server, metrics_listener)
        return serving

    async def _listen(self, server: HttpServer, listener: socket.socket) -> asyncio.Future[None]:
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.005)
        if serving.done():
            raise FrontError(f"the HTTP server did not start: {serving.exception()}")
        self._servers.append((server, serving))
        return serving

    async def stop(self) -> None:
        """Closes the listeners, and connections as they become idle."""
        for server, _ in self._servers:
            server.should_exit = True
        await asyncio.gather(*(serving for _, serving in self._servers))

    def close(self) -> None:
        if self._tracing is not None:
            self._tracing.close()

    def _gate(self) -> Gate:
        config = self._config
        recorders: list[Recorder] = [self._count]
        if config.access_log:
            recorders.append(log_access)
        if self._tracing is not None:
            recorders.append(self._tracing.record)
        cors = None
        if config.allowed_origins:
            cors = Cors(
                config.allowed_origins, config.allowed_methods, config.allowed_headers, config.allow_credentials
            )
        limits = KeyLimits(config.key_requests_per_minute, config.key_concurrent_requests)
        return Gate(self._keys, limits, cors, tuple(recorders), self.edge_metrics.on_refused)

    def _count(self, record: RequestRecord) -> None:
        self.edge_metrics.on_http(record.route, record.method, record.status, record.seconds)


def _current_id() -> str | None:
    record = current_record()
    return None if record is None else record.request_id


def _version() -> str:
    try:
        return importlib.metadata.version("awq-serve")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def _facts(config: ServerConfig, info: EngineInfo, model: ModelConfig, version: str) -> dict[str, Mapping[str, str]]:
    """What the info metrics say."""
    return {
        "build_info": {"version": version, "python": platform.python_version()},
        "cache_config_info": {
            "cache_dtype": config.engine.kv_cache_dtype,
            "enable_prefix_caching": str(config.engine.enable_prefix_caching),
            "gpu_memory_utilization": str(config.engine.memory_utilization),
        },
        "model_info": {
            "architecture": model.model_type,
            "max_model_len": str(info.max_model_len),
            "quantization": "none" if model.quantization is None else model.quantization.method,
            "group_size": "" if model.quantization is None else str(model.quantization.group_size),
        },
    }
