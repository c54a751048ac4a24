"""The `awq-serve` command: reads the options, starts the engine process, and serves HTTP until it is told to stop.

Kept light at import: the engine's process imports this module too, before it imports what it needs itself.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from server.config import EngineConfig, ServerConfig
from server.edge_options import check_edge
from server.keys import ApiKey, load_keys
from server.logs import configure_logging
from server.options import parse_options

if TYPE_CHECKING:
    from server.engine.client import Launcher
    from server.model_config import ModelConfig

logger = logging.getLogger("server")


_BACKLOG = 2048  # connections that wait to be accepted


class StartError(Exception):
    """The server cannot start; one line says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 after an orderly stop, 1 when the server cannot start or its engine is down for good, 2 for wrong options."""
    begun = time.monotonic()
    config = parse_options(arguments, os.environ)
    os.environ.pop("AWQSERVE_API_KEY", None)  # the processes that this one starts have no use for it
    configure_logging(config.log_level, config.log_format)
    try:
        return _run(config, begun)
    except StartError as error:
        print(f"awq-serve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the signal handlers were in place
        return 130


def _run(config: ServerConfig, begun: float) -> int:
    """Check what can be checked at once, start the engine, and import the web server while it loads."""
    from server.checkpoint_files import check_lengths, verify_sums
    from server.engine.client import EngineClient
    from server.model_config import ModelError, load_model_config
    from server.model_files import ModelFilesError, resolve_model, served_name

    listener = bind(config.host, config.port)
    metrics_listener = None
    if config.metrics_port is not None:
        metrics_listener = bind(config.host, config.metrics_port, "--metrics-port")
    keys = _prepare_front(config)
    names = config.served_model_names or (served_name(config.engine.model),)
    asked, config = config, replace(config, served_model_names=names)

    def open_model() -> tuple[EngineConfig, ModelConfig]:
        """The folder itself, not a link to it: a link that is set to another model counts at a reload, not before."""
        directory = resolve_model(asked.engine.model, asked.revision).resolve()
        return replace(asked.engine, model=str(directory)), load_model_config(directory)

    def open_whole_model() -> tuple[EngineConfig, ModelConfig]:
        """Before it takes the place of one that works, all that can be checked without loading it is."""
        opened = open_model()
        check_lengths(Path(opened[0].model))
        if asked.engine.verify_checksums:
            verify_sums(Path(opened[0].model))
        return opened

    try:
        engine_config, model = open_model()
    except (ModelFilesError, ModelError) as error:
        raise StartError(str(error)) from error
    client = EngineClient(_launcher(config, engine_config))
    try:
        client.launch()
    except OSError as error:
        raise StartError(f"the engine's process cannot be started: {error}") from error
    try:
        from server.serve import ServeError, Startup, serve

        try:
            startup = Startup(
                open_whole_model, lambda engine: _launcher(config, engine), listener, metrics_listener, keys, begun
            )
            serve(replace(config, engine=engine_config), client, model, startup)
        except ServeError as error:
            raise StartError(str(error)) from error
    finally:
        client.close()
        listener.close()
        if metrics_listener is not None:
            metrics_listener.close()
    return 0


def _launcher(config: ServerConfig, engine_config: EngineConfig) -> Launcher:
    from server.engine.process import in_process_engine, spawn_engine

    if config.in_process:
        return lambda epoch: in_process_engine(engine_config, epoch)
    return lambda epoch: spawn_engine(engine_config, epoch, config.log_level, config.log_format)


def _prepare_front(config: ServerConfig) -> tuple[ApiKey, ...]:
    """The API keys. What is wrong with keys and certificates is known before the model loads."""
    from server.tls import check_tls

    try:
        check_edge(config)
        keys = load_keys(config.api_keys, config.api_key_file)
        check_tls(config)
    except ValueError as error:
        raise StartError(str(error)) from error
    if short := [key.name for key in keys if key.is_short]:
        logger.warning("API keys that are short enough to be guessed: %s", ", ".join(short))
    if not keys and config.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("no --api-key: whoever reaches %s port %d may use the server", config.host, config.port)
    return keys


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """A listening socket, made before the model loads: a taken port is known at once."""
    try:
        [family, kind, protocol, _, address] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"--host {host}: {error.strerror}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise StartError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with {option}"
        ) from None
    return listener


if __name__ == "__main__":
    sys.exit(main())
