"""The HTTP listeners: uvicorn with deadlines and bounds around the application, TLS, and a small one for metrics and probes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from server.config import ServerConfig
from server.http_protocol import Guard, HttpLimits, guarded_protocol

logger = logging.getLogger("server")

# Seconds that connections get to take their last bytes once all requests have ended.
_CLOSE_TIMEOUT = 2

_MOST_DESCRIPTORS = 2**16  # some programs walk over all that may be open: no more than can be of use
_RESERVED_DESCRIPTORS = 128  # for pipes, files, the metrics listener, and connections that are turned away


class HttpServer(uvicorn.Server):
    """Leaves signals to its owner: uvicorn's own handling would cut running requests, and end the process by the signal."""

    handshake_timeout = 10.0  # seconds, of TLS: until then a connection is nobody's

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's for sockets that are bound already, with a bound on handshakes."""
        assert sockets is not None
        await self.lifespan.startup()
        loop, config = asyncio.get_running_loop(), self.config

        def make_protocol() -> asyncio.Protocol:
            return config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
            )

        self.servers = [
            await loop.create_server(
                make_protocol,
                sock=listener,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=self.handshake_timeout if config.ssl else None,
            )
            for listener in sockets
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def raise_descriptor_limit() -> int:
    """As high as this process may; returns what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def max_connections(config: ServerConfig, num_descriptors: int) -> int:
    """What the option says, or what leaves some descriptors in reserve."""
    most = max(1, num_descriptors - _RESERVED_DESCRIPTORS)
    if config.max_connections <= most:
        return config.max_connections
    logger.warning(
        "--max-connections %d: the limit of %d descriptors allows %d", config.max_connections, num_descriptors, most
    )
    return most


def make_guard(config: ServerConfig, on_refused: Callable[[str], None]) -> Guard:
    limits = HttpLimits(
        max_header_bytes=config.max_header_bytes,
        max_body_bytes=config.max_request_bytes,
        max_connections=max_connections(config, raise_descriptor_limit()),
        header_timeout=config.header_timeout,
        body_timeout=config.body_timeout,
        send_timeout=config.send_timeout,
    )
    return Guard(limits, on_refused)


def http_server(config: ServerConfig, app: ASGIApp, guard: Guard, *, tls: bool) -> HttpServer:
    uvicorn_config = uvicorn.Config(
        app,
        http=guarded_protocol(guard),
        lifespan="off",
        ws="none",
        log_config=None,
        log_level=config.log_level if config.log_level == "debug" else "warning",
        access_log=False,  # ours has ids, and leaves out queries
        server_header=False,
        proxy_headers=False,  # who the client is, the connection says; anybody can write X-Forwarded-For
        timeout_keep_alive=config.keep_alive_timeout,  # type: ignore[arg-type]  # a float does as well
        timeout_graceful_shutdown=_CLOSE_TIMEOUT,
        ssl_certfile=config.ssl_certfile if tls else None,
        ssl_keyfile=config.ssl_keyfile if tls else None,
        ssl_ca_certs=config.ssl_ca_certs if tls else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls and config.ssl_ca_certs else ssl.CERT_NONE,
    )
    server = HttpServer(uvicorn_config)
    server.handshake_timeout = config.header_timeout
    return server
