"""What the handlers share: the engine, the tokenizer, and the facts of the served model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.api.admission import Admission
from server.api.chat_template import ChatTemplate
from server.api.errors import RequestError
from server.api.tools import ToolFormat
from server.engine.client import EngineClient, EngineState, EngineUnavailable
from server.grammar import GrammarService
from server.text import Tokenizer


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request that says nothing gets: the checkpoint's generation_config, or the API's neutral values."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None  # chat only; None: the rest of the context


@dataclass(frozen=True, slots=True)
class ApiContext:
    """`render_metrics` gives the body and content type of /metrics. `created`: Unix seconds, of the model list."""

    engine: EngineClient
    tokenizer: Tokenizer
    model_names: tuple[str, ...]  # the first is what responses say
    vocab_size: int  # rows of the embedding: the token ids that a prompt may hold
    render_metrics: Callable[[], tuple[bytes, str]]
    created: int
    max_request_bytes: int
    version: str = "unknown"
    defaults: SamplingDefaults = SamplingDefaults()
    chat_template: ChatTemplate | None = None
    grammars: GrammarService | None = None
    tool_format: ToolFormat | None = None  # how the model writes tool calls
    has_priorities: bool = False  # whether the engine orders requests by them
    parses_reasoning: bool = False  # whether the model may begin with reasoning in <think> tags
    admission: Admission = field(default_factory=Admission)  # observes `engine`
    num_logged_characters: int | None = None  # of prompts that are logged; None: neither they nor parameters are

    @property
    def max_model_len(self) -> int:
        assert self.engine.info is not None, "the server answers only once the engine has started"
        return self.engine.info.max_model_len

    def model_name(self, requested: str | None) -> str:
        """The name to answer with. Raises RequestError 404 for a model that is not served."""
        if requested is None:
            return self.model_names[0]
        if requested not in self.model_names:
            raise RequestError(
                f"The model `{requested}` does not exist. Served here: {', '.join(self.model_names)}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        return requested


class ContextSource:
    """The context that requests are answered with: none while the model first loads, and another after a reload.

    A reload closes the source: those inside finish with the context they came with, new ones wait until it is open again.
    """

    def __init__(self, engine: EngineClient, version: str = "unknown", context: ApiContext | None = None) -> None:
        self.engine = engine
        self.version = version
        self._context = context
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._inside: set[asyncio.Task[object]] = set()
        self._expelled: set[asyncio.Task[object]] = set()

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered right now."""
        return self._context is not None and self._open.is_set() and self.engine.state is EngineState.READY

    @property
    def state(self) -> str:
        """In a word, for people."""
        return self.engine.state.value if self._open.is_set() else EngineState.RELOADING.value

    def current(self) -> ApiContext:
        """EngineUnavailable while there is none."""
        if self._context is None:
            raise EngineUnavailable("the model is loading", self.engine.retry_after)
        return self._context

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[ApiContext]:
        """The context for a request that the model is to answer."""
        await self._open.wait()
        context = self.current()
        task = asyncio.current_task()
        assert task is not None
        self._inside.add(task)
        self._empty.clear()
        try:
            yield context
        except asyncio.CancelledError:
            if task not in self._expelled:
                raise
            task.uncancel()
            raise EngineUnavailable("the model was loaded anew before the request was read") from None
        finally:
            self._inside.discard(task)
            self._expelled.discard(task)
            if not self._inside:
                self._empty.set()

    async def close(self, timeout: float) -> None:
        """From now on requests wait. Returns when none is inside any more, after `timeout` seconds at the latest."""
        self._open.clear()
        try:
            await asyncio.wait_for(self._empty.wait(), timeout)
        except TimeoutError:
            return

    def replace(self, context: ApiContext) -> None:
        """Whoever is still inside read half of a request with the old one: they may try again."""
        for task in self._inside:
            self._expelled.add(task)
            task.cancel()
        self._context = context

    def open(self) -> None:
        self._open.set()
