"""What the handlers share: the engine, the tokenizer, and the facts of the served model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from server.api.chat_template import ChatTemplate
from server.api.errors import RequestError
from server.api.tools import ToolFormat
from server.engine.client import EngineClient
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
