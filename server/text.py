"""Text at the edge: prompts to token ids, token ids to text as they come, and stop strings found on the way.

Everything beyond this module and the API speaks token ids only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from server.priority import step_back

_REPLACEMENT = "\ufffd"  # what decoders show for bytes that are no character (yet)

# Text up to this many characters is tokenized on the event loop: a few milliseconds at most. Longer text goes to a thread,
# where the tokenizer runs without the interpreter lock.
_INLINE_CHARACTERS = 8_192

# Above this it takes long enough to be felt by whoever is being served: one at a time, when the processor is free.
_LONG_CHARACTERS = 65_536

# How many of a prompt's last tokens may serve as left context of the output's text.
_MIN_CONTEXT = 4
_MAX_CONTEXT = 24


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes: printable ones of Latin-1 as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + index): value for index, value in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


class Tokenizer:
    """A checkpoint's `tokenizer.json`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()  # files carry training settings that would silently cut prompts
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self._long_pool = ThreadPoolExecutor(1, "tokenize-long", initializer=step_back)

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Raises ValueError naming the file when it is missing or not a tokenizer."""
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer: {error}") from error

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def max_token_characters(self) -> int:
        """Characters of the longest token: a text of c characters has at least c / this many tokens."""
        return max((len(token) for token in self._tokenizer.get_vocab(with_added_tokens=True)), default=1)

    @cached_property
    def byte_token_ids(self) -> frozenset[int]:
        """Tokens that stand for one byte each (byte fallback), empty where the decoder has none.

        Their text depends on the whole run of such tokens: one bad byte and the decoder shows every byte of the run as
        U+FFFD, so no part of a run can be shown before its end.
        """
        ids = {value: self._tokenizer.token_to_id(f"<0x{value:02X}>") for value in range(256)}
        if ids[0x41] is None or self._tokenizer.decode([ids[0x41]], skip_special_tokens=False) != "A":
            return frozenset()
        return frozenset(token_id for token_id in ids.values() if token_id is not None)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that a decoding with skip_special_tokens passes over."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def is_special(self, token: str) -> bool:
        return self._tokenizer.token_to_id(token) in self.special_token_ids

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether token strings spell bytes with the characters of byte-level BPE."""
        decoder = self._tokenizer.decoder
        return decoder is not None and b"ByteLevel" in decoder.__getstate__()

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for by itself: part of a character, maybe. Empty for ids that the tokenizer lacks."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_token_ids:
            return token.encode()
        if self._is_byte_level:
            return b"".join(
                bytes((_BYTE_OF_CHARACTER[char],)) if char in _BYTE_OF_CHARACTER else char.encode() for char in token
            )
        if token_id in self.byte_token_ids:
            return bytes((int(token[3:5], 16),))
        return token.replace("\u2581", " ").encode()

    @cached_property
    def _added_token_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    async def encode_all(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text, without keeping the event loop from others for long."""
        length = sum(map(len, texts))
        if length <= _INLINE_CHARACTERS:
            return [self.encode(text, add_special_tokens) for text in texts]
        loop, pool = asyncio.get_running_loop(), self._pool if length <= _LONG_CHARACTERS else self._long_pool
        return [await loop.run_in_executor(pool, self.encode, text, add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def new_stream(self, context: Sequence[int], skip_special_tokens: bool) -> DecodeStream:
        return DecodeStream(ids=list(context), skip_special_tokens=skip_special_tokens)

    def step(self, stream: DecodeStream, token_ids: Sequence[int]) -> str | None:
        return stream.step(self._tokenizer, list(token_ids))


class Detokenizer:
    """The text of one output, piece by piece.

    The pieces' concatenation equals `whole()`: the decoding of prompt and output less that of the prompt, so that an output
    keeps the space that parts it from its prompt. No piece ends inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # For the decoder these are not there: bytes before and after one are neighbours.
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._context = self._clean_context(prompt_token_ids)
        self._context_length = len(self._decode(self._context))
        self._stream: DecodeStream | None = tokenizer.new_stream(self._context, skip_special_tokens)
        self._token_ids: list[int] = []
        self._byte_run: list[int] = []  # byte tokens not yet given to the stream
        self._num_emitted = 0  # characters
        self._is_behind = False  # the last token has not shown in the text

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; often one token's, sometimes none."""
        byte_token_ids = self._tokenizer.byte_token_ids
        text = ""
        for token_id in token_ids:
            self._token_ids.append(token_id)
            if token_id in self._skipped:
                continue
            if token_id in byte_token_ids:
                self._byte_run.append(token_id)
                self._is_behind = True
            else:
                text += self._advance([*self._byte_run, token_id] if self._byte_run else [token_id])
        self._num_emitted += len(text)
        return text

    def finish(self) -> str:
        """What `feed` held back, an incomplete character included, as the whole decoding shows it."""
        if not self._is_behind:
            return ""
        rest = self.whole()[self._num_emitted :]
        self._num_emitted += len(rest)
        self._is_behind = False
        return rest

    def whole(self) -> str:
        return self._decode([*self._context, *self._token_ids])[self._context_length :]

    def _advance(self, token_ids: list[int]) -> str:
        self._byte_run = []
        text: str | None = None
        if self._stream is not None:
            try:
                text = self._tokenizer.step(self._stream, token_ids)
            except Exception:  # a bare Exception: the decoder changed text that the stream had given out already
                self._stream = None
        if self._stream is None:
            rest = self.whole()[self._num_emitted :]
            text = None if rest.endswith(_REPLACEMENT) else rest
        self._is_behind = not text
        return text or ""

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)

    def _clean_context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's shortest tail of some tokens that ends in whole characters; empty when there is none."""
        last = next((token_id for token_id in reversed(prompt_token_ids) if token_id not in self._skipped), None)
        if last in self._tokenizer.byte_token_ids:
            return []
        longest = min(_MAX_CONTEXT, len(prompt_token_ids))
        for length in range(min(_MIN_CONTEXT, longest), longest + 1):
            tail = list(prompt_token_ids[len(prompt_token_ids) - length :])
            if _REPLACEMENT not in self._decode(tail):
                return tail
        return []


class StopStrings:
    """Finds the first stop string in text that comes in pieces, however it is cut, and never lets part of it out.

    First is the one whose last character comes first; of those that end together, the longest.
    """

    def __init__(self, stop_strings: Sequence[str], include_in_output: bool = False) -> None:
        assert all(stop_strings), "an empty stop string matches everywhere"
        self._stop_strings = tuple(stop_strings)
        self._include_in_output = include_in_output
        self._held = ""  # could be the start of a stop string
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """The text that is certainly output. Once `matched` is set there is no more."""
        if not self._stop_strings:
            return piece
        if self.matched is not None:
            return ""
        text = self._held + piece
        matches = [(start + len(stop), start, stop) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if matches:
            end, start, self.matched = min(matches)
            self._held = ""
            return text[: end if self._include_in_output else start]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """The text held back: the output has ended without completing a stop string."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string starts with."""
        longest = 0
        for stop in self._stop_strings:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if stop[length - 1] == text[-1] and text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
