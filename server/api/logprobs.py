"""Log probabilities in the shapes of the API: OpenAI's two, and vLLM's for prompts."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from server.api.generation import Choice
from server.api.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from server.text import Tokenizer
from server.types import TokenLogprob

_LEAST = -9999.0  # stands for minus infinity, which JSON lacks


class CompletionLogprobsWriter:
    """The `logprobs` of one completion choice, piece by piece: offsets go on from piece to piece.

    Offsets are into the text, which shows no `hidden` tokens. A token within a character has the character's.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, hidden: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._hidden = hidden
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> CompletionLogprobs:
        """One entry per token, None for a prompt's first."""
        written = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, entries, strict=True):
            token = _unique_text(self._tokenizer, token_id)
            written.tokens.append(token)
            written.text_offset.append(self._offset)
            written.token_logprobs.append(None if entry is None else _finite(entry.logprob))
            written.top_logprobs.append(None if entry is None else self._top(token, entry))
            if token_id not in self._hidden:
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return written

    def _top(self, token: str, entry: TokenLogprob) -> dict[str, float]:
        """The token itself is always among them."""
        likeliest = zip(entry.top_token_ids[: self._num_top], entry.top_logprobs, strict=False)
        top = {_unique_text(self._tokenizer, token_id): _finite(logprob) for token_id, logprob in likeliest}
        return top | {token: _finite(entry.logprob)}


def chat_logprobs(
    tokenizer: Tokenizer, num_top: int, token_ids: Sequence[int], entries: Sequence[TokenLogprob]
) -> ChatLogprobs:
    content = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        data = tokenizer.token_bytes(token_id)
        top = []
        for top_id, logprob in zip(entry.top_token_ids[:num_top], entry.top_logprobs, strict=False):
            top_data = tokenizer.token_bytes(top_id)
            top.append(TopLogprob(_text(top_data), _finite(logprob), list(top_data)))
        content.append(ChatTokenLogprob(_text(data), _finite(entry.logprob), list(data), top))
    return ChatLogprobs(content)


def prompt_logprobs(tokenizer: Tokenizer, num_top: int, choice: Choice) -> PromptLogprobs | None:
    """Of a whole prompt; None where the request ended before. Keys are token ids, the token's own and the likeliest."""
    if choice.prompt_logprobs is None:
        return None
    written: PromptLogprobs = [None]
    for token_id, entry in zip(choice.prompt.token_ids[1:], choice.prompt_logprobs, strict=True):
        ranked = {token_id: (entry.logprob, entry.rank)}
        for rank, (top_id, logprob) in enumerate(
            zip(entry.top_token_ids[:num_top], entry.top_logprobs, strict=False), 1
        ):
            ranked.setdefault(top_id, (logprob, rank))
        written.append(
            {
                str(key): PromptLogprob(_finite(logprob), rank, _text(tokenizer.token_bytes(key)))
                for key, (logprob, rank) in ranked.items()
            }
        )
    return written


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _unique_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The token as text, or its bytes spelt out where they are no text: as keys they must differ."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{value:02x}" for value in data)
