"""What every request with prompts is checked for, whichever endpoint it came by."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from server.api.context import ApiContext
from server.api.errors import RequestError
from server.text import Tokenizer

logger = logging.getLogger(__name__)

_MAX_LOGGED_PARAMETERS = 1000  # characters: grammars are among them


def split_prompt(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[list[str] | None, list[list[int]]]:
    """The prompt as several texts, or else as several lists of token ids. Lists are of one kind: the schema's."""
    if isinstance(prompt, str):
        return [prompt], []
    if isinstance(prompt[0], str):
        return prompt, []
    if isinstance(prompt[0], int):
        return None, [prompt]
    return None, prompt


def refuse_unknown_ids(token_ids: list[int], context: ApiContext, param: str) -> None:
    highest = max(token_ids, default=-1)
    if highest >= context.vocab_size:
        raise RequestError(
            f"{param}: token id {highest} is outside the vocabulary of {context.vocab_size}", param=param
        )


MAX_TOKENIZED_CHARACTERS = 2**20
"""Of what is tokenized without regard to the context's length."""


def refuse_huge_text(text: str, param: str) -> None:
    if len(text) > MAX_TOKENIZED_CHARACTERS:
        raise RequestError(
            f"{param}: must be at most {MAX_TOKENIZED_CHARACTERS} characters (got {len(text)})", param=param
        )


def refuse_longer_text(texts: list[str], context: ApiContext, param: str) -> None:
    """Refuse text that cannot fit without tokenizing it, which would take seconds for megabytes."""
    for text in texts:
        if len(text) <= 8 * context.max_model_len:
            continue
        least = len(text) // context.tokenizer.max_token_characters
        if least > context.max_model_len:
            raise _too_long(f"at least {least}", context.max_model_len, param)


def room_after(ids: list[int], context: ApiContext, needs_output: bool, param: str = "prompt") -> int:
    """How many tokens can follow the prompt. Raises RequestError when it does not fit, with room for one if asked for."""
    room = context.max_model_len - len(ids)
    if room < 0:
        raise _too_long(str(len(ids)), context.max_model_len, param)
    if room == 0 and needs_output:
        raise RequestError(
            f"This model's maximum context length is {context.max_model_len} tokens. However, your prompt contains "
            f"{len(ids)} input tokens, which leaves no room for output tokens. Please reduce the length of the input prompt.",
            param=param,
            code="context_length_exceeded",
        )
    return room


def _too_long(num_tokens: str, max_model_len: int, param: str) -> RequestError:
    # vLLM's words: clients look for "maximum context length".
    return RequestError(
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains {num_tokens} input "
        "tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt.",
        param=param,
        code="context_length_exceeded",
    )


def refuse_priority(priority: int | None, context: ApiContext) -> None:
    if priority and not context.has_priorities:
        raise RequestError(
            "priority: this server serves who comes first; it needs --scheduling-policy priority", param="priority"
        )


def log_prompts(
    tokenizer: Tokenizer, name: str, prompts: Sequence[list[int]], num_characters: int, parameters: Any
) -> None:
    """What --enable-log-requests asks for: the one place where prompts reach the log."""
    for token_ids in prompts:
        text = tokenizer.decode(token_ids[: num_characters + 1], skip_special_tokens=False)[:num_characters]
        logger.info(
            "%s: %d prompt tokens: %r; %s", name, len(token_ids), text, str(parameters)[:_MAX_LOGGED_PARAMETERS]
        )
