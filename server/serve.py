"""Serving: the application over a starting engine, uvicorn around it, and an orderly end on SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, ProcessCollector

from server.api.app import create_app
from server.api.chat_template import ChatTemplate, load_chat_template
from server.api.context import ApiContext, SamplingDefaults
from server.api.tools import TOOL_FORMATS, ToolFormat, detect_format
from server.config import ServerConfig
from server.engine.client import EngineClient, EngineUnavailable
from server.grammar import THINK_END, GrammarService
from server.metrics import MetricsRecorder
from server.model_files import ensure_tokenizer_file, load_sampling_defaults
from server.text import Tokenizer
from server.types import EngineInfo

logger = logging.getLogger("server")

# Seconds that connections get to take their last bytes once all requests have ended.
_CLOSE_TIMEOUT = 2


class ServeError(Exception):
    """The server cannot start or listen; one line says why."""


class _HttpServer(uvicorn.Server):
    """Leaves signals to `_Stop`: uvicorn's own handling would cut running requests, and end the process by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Stop:
    """Set by the first SIGINT or SIGTERM; `hurry` by the second. Belongs to the running event loop."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurry = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.hurry if self.asked.is_set() else self.asked).set()


def serve(config: ServerConfig, client: EngineClient, listener: socket.socket, vocab_size: int) -> None:
    """Serve until told to stop. `client` has been launched; whatever happens, its engine has ended on return.

    Raises ServeError when the server cannot start.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config, client, listener, vocab_size))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed: it takes half the processor time per chunk."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _serve(config: ServerConfig, client: EngineClient, listener: socket.socket, vocab_size: int) -> None:
    stop = _Stop()
    begin = time.monotonic()
    files: _Files | None = None
    starting = asyncio.ensure_future(client.start())
    try:
        files = _read_files(config)  # while the engine loads
        if not await _first(starting, stop.asked):
            return
        info = starting.result()
        app = create_app(_context(config, client, info, vocab_size, files))
        server = _HttpServer(_http_config(config, app))
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.005)
        if serving.done():
            raise ServeError(f"the HTTP server did not start: {serving.exception()}")
        logger.info("started in %.1f s", time.monotonic() - begin)
        print(_ready_line(config, listener, info), flush=True)
        await _first(serving, stop.asked)
        await _end_requests(config, client, stop)
        server.should_exit = True
        await serving
    except EngineUnavailable as error:
        raise ServeError(str(error)) from error
    except ValueError as error:  # a tokenizer, template or generation config that cannot be used
        raise ServeError(str(error)) from error
    finally:
        starting.cancel()
        await client.stop()
        if files is not None:
            files.grammars.close()


def _http_config(config: ServerConfig, app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level=config.log_level if config.access_log or config.log_level == "debug" else "warning",
        access_log=config.access_log,
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_TIMEOUT,
    )


async def _first(task: asyncio.Future[Any], event: asyncio.Event) -> bool:
    """Waits for either. True when the task is done."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return task.done()


async def _end_requests(config: ServerConfig, client: EngineClient, stop: _Stop) -> None:
    """Let running requests finish, up to the drain timeout or a second signal; abort the rest, which answers them."""
    client.refuse_new()
    if client.num_unfinished:
        logger.info(
            "stopping: waiting up to %g s for %d running requests (again Ctrl-C: at once)",
            config.drain_timeout,
            client.num_unfinished,
        )
        draining = asyncio.ensure_future(client.drain(config.drain_timeout))
        await _first(draining, stop.hurry)
        draining.cancel()
        if client.num_unfinished:
            logger.warning("stopping: %d requests are cut short", client.num_unfinished)
    await client.stop()


@dataclass(frozen=True, slots=True)
class _Files:
    """What the model's text files say."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    defaults: SamplingDefaults
    grammars: GrammarService


def _read_files(config: ServerConfig) -> _Files:
    """Raises ValueError naming the file at fault."""
    directory = Path(config.engine.model)
    override = None if config.chat_template is None else Path(config.chat_template)
    tokenizer_file = ensure_tokenizer_file(directory)
    return _Files(
        Tokenizer.from_file(tokenizer_file),
        load_chat_template(directory, override),
        load_sampling_defaults(directory, config.generation_config),
        GrammarService(tokenizer_file),
    )


def _context(
    config: ServerConfig, client: EngineClient, info: EngineInfo, vocab_size: int, files: _Files
) -> ApiContext:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    recorder = MetricsRecorder(registry, config.served_model_names[0], info)
    client.observer = recorder
    try:
        version = importlib.metadata.version("awq-serve")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        version = "unknown"
    return ApiContext(
        engine=client,
        tokenizer=files.tokenizer,
        model_names=config.served_model_names,
        vocab_size=vocab_size,
        render_metrics=recorder.render,
        created=int(time.time()),
        max_request_bytes=config.max_request_bytes,
        version=version,
        defaults=files.defaults,
        chat_template=files.chat_template,
        grammars=files.grammars,
        tool_format=_tool_format(config, files.chat_template),
        has_priorities=config.engine.scheduling_policy == "priority",
        parses_reasoning=_parses_reasoning(config, files.chat_template),
    )


def _tool_format(config: ServerConfig, template: ChatTemplate | None) -> ToolFormat | None:
    if config.tool_call_parser == "auto":
        return None if template is None else detect_format(template.source)
    return TOOL_FORMATS.get(config.tool_call_parser)


def _parses_reasoning(config: ServerConfig, template: ChatTemplate | None) -> bool:
    if config.reasoning_parser == "auto":
        return template is not None and THINK_END in template.source
    return config.reasoning_parser == "think"


def _ready_line(config: ServerConfig, listener: socket.socket, info: EngineInfo) -> str:
    """Says where, and what to paste to try it."""
    port = listener.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(config.host, config.host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return (
        f"awq-serve is ready: {config.served_model_names[0]} at {url} "
        f"({info.backend} kernels, {info.max_model_len} tokens of context). Try:\n"
        f"curl {url}/v1/completions -H 'Content-Type: application/json' "
        """-d '{"prompt": "The capital of France is", "max_tokens": 32}'"""
    )
