"""Serving: the application over a starting engine, uvicorn around it, reloads on SIGHUP, an orderly end on SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.api.chat_template import ChatTemplate, load_chat_template
from server.api.context import ApiContext, ContextSource, SamplingDefaults
from server.api.tools import TOOL_FORMATS, ToolFormat, detect_format
from server.config import EngineConfig, ServerConfig
from server.engine.client import EngineClient, EngineUnavailable, Launcher
from server.front import Front, FrontError
from server.grammar import THINK_END, GrammarService
from server.keys import ApiKey
from server.model_config import ModelConfig
from server.model_files import ensure_tokenizer_file, load_sampling_defaults
from server.text import Tokenizer
from server.types import EngineInfo

logger = logging.getLogger("server")


class ServeError(Exception):
    """The server cannot start or listen; one line says why."""


class _Signals:
    """`stop` is set by the first SIGINT or SIGTERM, `hurry` by the second, `reload` by SIGHUP. Of the running event loop."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.reload = asyncio.Event()
        self._had_terminal = _has_terminal()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    def _on_stop(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()

    def _on_hangup(self) -> None:
        """Also what a terminal sends that is closed: then nobody watches a server that was started there."""
        if self._had_terminal and not _has_terminal():
            self._on_stop()
        else:
            self.reload.set()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Startup:
    """What `serve` is given. `open_model` finds and checks the model anew, for a reload: the configuration of its engine, and its
    own; ValueError for one that is not fit. `launcher` starts engines of a configuration. `begun` is the monotonic time when the
    command began."""

    open_model: Callable[[], tuple[EngineConfig, ModelConfig]]
    launcher: Callable[[EngineConfig], Launcher]
    listener: socket.socket
    metrics_listener: socket.socket | None
    keys: tuple[ApiKey, ...]
    begun: float


def serve(config: ServerConfig, client: EngineClient, model: ModelConfig, startup: Startup) -> None:
    """Serve until told to stop. `client` has been launched; whatever happens, its engine has ended on return.

    Raises ServeError when the server cannot start, and when its engine is down for good.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config, client, model, startup))


async def _serve(config: ServerConfig, client: EngineClient, model: ModelConfig, startup: Startup) -> None:
    try:
        service = _Service(config, client, startup)
    except FrontError as error:
        raise ServeError(str(error)) from error
    await service.run(model)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed: it takes half the processor time per chunk."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


class _Service:
    """The application from its start, while the model still loads, to its end. Made on the event loop."""

    def __init__(self, config: ServerConfig, client: EngineClient, startup: Startup) -> None:
        self._config = config
        self._client = client
        self._startup = startup
        self._front = Front(config, startup.keys)
        self._source = ContextSource(client, self._front.version)
        self._signals = _Signals()
        self._files: _Files | None = None
        self._is_observed = False
        self._reloading: asyncio.Task[None] | None = None

    async def run(self, model: ModelConfig) -> None:
        starting = asyncio.ensure_future(self._client.start())
        startup = self._startup
        try:
            serving = await self._front.start(self._source, startup.listener, startup.metrics_listener)
            self._files = await asyncio.to_thread(_read_files, self._config, self._config.engine.model)
            await _first(starting, serving, self._signals.stop)
            if starting.done():
                info = starting.result()
                self._source.replace(self._context(info, model, self._files))
                logger.info("started in %.1f s", time.monotonic() - startup.begun)
                self._say(_ready_line(self._config, startup.listener, info))
                await self._until_stopped(serving)
            if serving.done():
                raise ServeError(f"the HTTP server ended: {serving.exception()}")
            await self._end_requests()
            await self._front.stop()
            if self._client.died.is_set():
                raise ServeError(f"the engine is down: {self._client.failure}")
        except (EngineUnavailable, FrontError) as error:
            raise ServeError(str(error)) from error
        except ValueError as error:  # a tokenizer, template or generation config that cannot be used
            raise ServeError(str(error)) from error
        finally:
            await self._end(starting)

    async def _end(self, starting: asyncio.Future[EngineInfo]) -> None:
        starting.cancel()
        await self._end_reload()
        await self._client.stop()
        await self._front.stop()
        await asyncio.gather(starting, return_exceptions=True)
        self._front.close()
        if self._files is not None:
            self._files.grammars.close()

    def _say(self, text: str) -> None:
        if self._config.log_format == "json":
            logger.info("%s", text)
        else:
            print(text, flush=True)

    async def _until_stopped(self, serving: asyncio.Future[None]) -> None:
        """Reloads when asked to. Returns on a signal to stop, or when the engine is down for good."""
        signals = self._signals
        while True:
            await _first(serving, signals.stop, signals.reload, self._client.died)
            if serving.done() or signals.stop.is_set() or self._client.died.is_set():
                return
            signals.reload.clear()
            if self._reloading is None or self._reloading.done():
                self._reloading = asyncio.ensure_future(self._reload())

    async def _reload(self) -> None:
        """The model's files are read again. Where they are not fit, the model that is served stays."""
        begin = time.monotonic()
        try:
            engine_config, model = await asyncio.to_thread(self._startup.open_model)
            files = await asyncio.to_thread(_read_files, self._config, engine_config.model)
        except ValueError as error:
            logger.error("not reloaded, the model that is served stays: %s", error)
            return
        logger.info("reloading: new requests wait; running ones get %g s", self._config.drain_timeout)
        former = self._files
        kept: _Files | None = files
        try:
            deadline = time.monotonic() + self._config.drain_timeout
            await self._source.close(self._config.drain_timeout)
            launch = self._startup.launcher(engine_config)
            info = await self._client.reload(launch, max(0.0, deadline - time.monotonic()))
            self._source.replace(self._context(info, model, files))
            self._files, kept = files, former
            logger.info("reloaded in %.1f s", time.monotonic() - begin)
        except EngineUnavailable as error:
            logger.error("not reloaded, the former model is started again: %s", error)
        finally:
            if kept is not None:
                kept.grammars.close()
            self._source.open()

    async def _end_reload(self) -> None:
        """Who waits for it is told that the server stops."""
        if self._reloading is not None:
            self._reloading.cancel()
            await asyncio.gather(self._reloading, return_exceptions=True)

    async def _end_requests(self) -> None:
        """Let running requests finish, up to the drain timeout or a second signal; abort the rest, which answers them."""
        self._client.refuse_new()
        await self._end_reload()
        if self._client.num_unfinished:
            timeout = self._config.drain_timeout
            logger.info(
                "stopping: waiting up to %g s for %d running requests (again Ctrl-C: at once)",
                timeout,
                self._client.num_unfinished,
            )
            draining = asyncio.ensure_future(self._client.drain(timeout))
            await _first(draining, self._signals.hurry)
            draining.cancel()
            if self._client.num_unfinished:
                logger.warning("stopping: %d requests are cut short", self._client.num_unfinished)
        await self._client.stop()

    def _context(self, info: EngineInfo, model: ModelConfig, files: _Files) -> ApiContext:
        config, front = self._config, self._front
        if not self._is_observed:
            self._client.observer = front.observe(info, model)
            self._is_observed = True
        files.grammars.observer = front.edge_metrics
        return ApiContext(
            engine=self._client,
            tokenizer=files.tokenizer,
            model_names=config.served_model_names,
            vocab_size=model.vocab_size,
            render_metrics=front.render_metrics,
            created=int(time.time()),
            max_request_bytes=config.max_request_bytes,
            version=self._source.version,
            defaults=files.defaults,
            chat_template=files.chat_template,
            grammars=files.grammars,
            tool_format=_tool_format(config, files.chat_template),
            has_priorities=config.engine.scheduling_policy == "priority",
            parses_reasoning=_parses_reasoning(config, files.chat_template),
            admission=front.admission,
            num_logged_characters=config.max_log_len if config.log_requests else None,
        )


async def _first(*awaited: asyncio.Future[Any] | asyncio.Event) -> None:
    """Waits for any of them."""
    waiting = [asyncio.ensure_future(item.wait()) for item in awaited if isinstance(item, asyncio.Event)]
    futures = [item for item in awaited if not isinstance(item, asyncio.Event)]
    await asyncio.wait({*futures, *waiting}, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


@dataclass(frozen=True, slots=True)
class _Files:
    """What the model's text files say."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    defaults: SamplingDefaults
    grammars: GrammarService


def _read_files(config: ServerConfig, model: str) -> _Files:
    """Raises ValueError naming the file at fault."""
    directory = Path(model)
    override = None if config.chat_template is None else Path(config.chat_template)
    tokenizer_file = ensure_tokenizer_file(directory)
    return _Files(
        Tokenizer.from_file(tokenizer_file),
        load_chat_template(directory, override),
        load_sampling_defaults(directory, config.generation_config),
        GrammarService(tokenizer_file),
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
    scheme = "http" if config.ssl_certfile is None else "https"
    url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    key = ' -H "Authorization: Bearer $KEY"' if config.api_keys or config.api_key_file else ""
    return (
        f"awq-serve is ready: {config.served_model_names[0]} at {url} "
        f"({info.backend} kernels, {info.max_model_len} tokens of context). Try:\n"
        f"curl {url}/v1/completions{key} -H 'Content-Type: application/json' "
        """-d '{"prompt": "The capital of France is", "max_tokens": 32}'"""
    )
