"""A deterministic engine without a model, and a small tokenizer: what the tests of the edge stand on."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import httpx
import uvicorn
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from server.api.admission import Admission, Observers
from server.api.app import Gate, create_app
from server.api.chat_template import ChatTemplate
from server.api.context import ApiContext, SamplingDefaults
from server.engine.client import EngineClient
from server.engine.process import thread_engine
from server.http_protocol import Guard, HttpLimits, guarded_protocol
from server.metrics import MetricsRecorder
from server.text import Tokenizer
from server.types import (
    AbortReason,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    RequestTimings,
    StepOutput,
    StepStats,
    TokenEvent,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A server answers requests; a scheduler decides which of them share a step.",
    "Schöne Grüße aus Zürich: naïve café, 你好世界, こんにちは, 🙂🚀👩‍👩‍👧.",
    "def add(left, right):\n    return left + right\n",
]
END = "<|end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message.role + ' is unknown') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ suffix | default('') }}"
)


@cache
def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE with one special token, trained on `CORPUS`: characters of several bytes take several tokens."""
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return Tokenizer(tokenizer)


END_ID = 0  # special tokens come first


@dataclass
class _Running:
    request: GenerateRequest
    num_tokens: int = 0
    first: float | None = None


@dataclass
class EchoEngine:
    """Output token i is prompt token (i + seed) mod length; `END_ID` ends it. One token per request and step."""

    info: EngineInfo
    step_seconds: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)  # cleared: `step` blocks
    fail_on_token: int | None = None  # a prompt with it crashes the step
    running: dict[str, _Running] = field(default_factory=dict)
    submitted: list[GenerateRequest] = field(default_factory=list)
    aborted: list[tuple[str, AbortReason]] = field(default_factory=list)
    is_closed: bool = False
    before_step: Callable[[], None] | None = None
    on_launch: Callable[[list[str], float], None] | None = None
    predicted_seconds: float = 0.0
    _events: list[TokenEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    def restart(self, epoch: int) -> None:
        """As a new engine that knows nothing of the old one's requests."""
        self.info = replace(self.info, epoch=epoch)
        self.running.clear()
        self._events.clear()

    def submit(self, request: GenerateRequest) -> None:
        if len(request.prompt_token_ids) + request.sampling.max_tokens > self.info.max_model_len:
            raise ValueError("does not fit")
        self.submitted.append(request)
        self.running[request.request_id] = _Running(request)

    def abort(self, request_id: str, reason: AbortReason) -> None:
        self.aborted.append((request_id, reason))
        running = self.running.pop(request_id, None)
        if running is not None:
            self._events.append(self._last_event(running, [], reason.finish_reason))

    def has_work(self) -> bool:
        return bool(self.running or self._events)

    def step(self) -> StepOutput:
        self.gate.wait(30)
        if self.before_step is not None:
            self.before_step()
        if self.step_seconds:
            time.sleep(self.step_seconds)
        events, self._events = self._events, []
        if self.on_launch is not None:
            self.on_launch(list(self.running), self.predicted_seconds)
        for running in list(self.running.values()):
            if self.fail_on_token in running.request.prompt_token_ids:
                raise RuntimeError("planted failure")
            events.append(self._advance(running))
        num_tokens = sum(len(event.token_ids) for event in events)
        used = min(len(self.running), self.info.num_blocks)
        stats = StepStats(len(self.running), 0, self.info.num_blocks, used, 0, num_generation_tokens=num_tokens)
        return StepOutput(self.info.epoch, events, stats)

    def close(self) -> None:
        self.is_closed = True

    def _advance(self, running: _Running) -> TokenEvent:
        request, sampling = running.request, running.request.sampling
        prompt = request.prompt_token_ids
        token = prompt[(running.num_tokens + (sampling.seed or 0)) % len(prompt)]
        running.num_tokens += 1
        running.first = running.first or time.monotonic()
        may_stop = running.num_tokens > sampling.min_tokens
        if may_stop and ((token == END_ID and not sampling.ignore_eos) or token in sampling.stop_token_ids):
            del self.running[request.request_id]
            return self._last_event(running, [token], FinishReason.STOP, token)
        if running.num_tokens == sampling.max_tokens:
            del self.running[request.request_id]
            return self._last_event(running, [token], FinishReason.LENGTH)
        return TokenEvent(request.request_id, [token], num_cached_tokens=self._num_cached(request))

    def _last_event(
        self, running: _Running, token_ids: list[int], reason: FinishReason, stop_token_id: int | None = None
    ) -> TokenEvent:
        arrival = running.request.arrival_time
        timings = RequestTimings(arrival, running.first and arrival, running.first, time.monotonic(), 0)
        cached = self._num_cached(running.request)
        return TokenEvent(running.request.request_id, token_ids, cached, reason, stop_token_id, None, timings)

    @staticmethod
    def _num_cached(request: GenerateRequest) -> int:
        """As if the prefix cache held all but the last token of every prompt longer than 8 tokens."""
        return len(request.prompt_token_ids) - 1 if len(request.prompt_token_ids) > 8 else 0


@dataclass
class Edge:
    """A running edge: the application over a fake engine."""

    engine: EchoEngine
    client: EngineClient
    context: ApiContext
    app: Any
    http: httpx.AsyncClient
    loop: asyncio.AbstractEventLoop


def echo_engine(max_model_len: int = 512, **options: Any) -> EchoEngine:
    return EchoEngine(EngineInfo(0, max_model_len, 64, 16, "fake"), **options)


def http_limits(**changes: Any) -> HttpLimits:
    """Generous but for the changes."""
    limits = HttpLimits(
        max_header_bytes=2**14,
        max_body_bytes=2**20,
        max_connections=100,
        header_timeout=10,
        body_timeout=10,
        send_timeout=10,
    )
    return replace(limits, **changes)


@contextmanager
def served_edge(
    engine: EchoEngine | None = None, guard: Guard | None = None, **context_fields: Any
) -> Iterator[tuple[str, Edge]]:
    """`running_edge` behind a real HTTP server in a thread: its URL and the edge."""
    ready: queue.SimpleQueue[tuple[str, Edge] | BaseException] = queue.SimpleQueue()
    done = threading.Event()

    async def serve() -> None:
        async with running_edge(engine, **context_fields) as edge:
            listener = socket.create_server(("127.0.0.1", 0))
            config = uvicorn.Config(
                edge.app,
                http=guarded_protocol(guard or Guard(http_limits())),
                lifespan="off",
                log_level="warning",
                ws="none",
                timeout_graceful_shutdown=2,
            )
            server = uvicorn.Server(config)
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.002)
            ready.put((f"http://127.0.0.1:{listener.getsockname()[1]}", edge))
            await asyncio.to_thread(done.wait)
            server.should_exit = True
            await serving

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            ready.put(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    started = ready.get(timeout=30)
    try:
        if isinstance(started, BaseException):
            raise started
        yield started
    finally:
        done.set()
        thread.join(30)


def sse_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which must end in `[DONE]`."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)


@asynccontextmanager
async def running_edge(
    engine: EchoEngine | None = None,
    on_build: Callable[[], None] | None = None,
    gate: Gate | None = None,
    **context_fields: Any,
) -> AsyncIterator[Edge]:
    """The application over `engine`, called in process; the engine's loop runs in a thread, as with `--in-process`."""
    engine = engine or echo_engine()

    def build(epoch: int) -> EchoEngine:
        if on_build is not None:
            on_build()
        engine.restart(epoch)
        return engine

    client = EngineClient(lambda epoch: thread_engine(lambda: build(epoch), epoch))
    info = await client.start()
    recorder = MetricsRecorder(CollectorRegistry(), "echo", info)
    admission = context_fields.setdefault("admission", Admission())
    client.observer = Observers(admission, recorder)
    tokenizer = byte_level_tokenizer()
    fields: dict[str, Any] = {
        "tokenizer": tokenizer,
        "model_names": ("echo", "alias"),
        "vocab_size": tokenizer.vocab_size,
        "render_metrics": recorder.render,
        "created": 1_700_000_000,
        "max_request_bytes": 2**20,
        "defaults": SamplingDefaults(),
        "chat_template": ChatTemplate(CHAT_TEMPLATE, {"eos_token": END}),
    }
    context = ApiContext(engine=client, **(fields | context_fields))
    app = create_app(context, gate)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://edge", timeout=20) as http:
        try:
            yield Edge(engine, client, context, app, http, asyncio.get_running_loop())
        finally:
            engine.gate.set()
            await client.stop()
