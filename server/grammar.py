"""What structured-output requests ask for, made into grammars that the engine can use, or refused.

Users' schemas, expressions and grammars are programs: one may take forever or all memory to read. A process of its own reads
them, under limits of size, time and memory, and is killed when it exceeds them. What has passed is remembered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import resource
import signal
import time
from collections import OrderedDict
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal, Protocol

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from server.priority import step_back

MAX_SOURCE_LENGTH = 256 * 1024  # characters
COMPILE_SECONDS = 5.0
MAX_MASK_SECONDS = 0.25  # of the processor, to find which tokens may come next: everybody's step waits for it
START_SECONDS = 60.0  # of the process itself, which loads a tokenizer
MAX_MEMORY = 2 * 2**30  # bytes of address space
_MAX_CACHED = 256
_MAX_CACHED_LENGTH = 2**24  # characters of what is remembered, grammars and their sources together

THINK = "<think>"
THINK_END = "</think>"
_THINK_END_PATTERN = r"<\/think>"
Reasoning = Literal["none", "possible", "begun"]
"""Whether an answer may or must begin with reasoning, up to THINK_END: "begun" where the prompt opens it."""

# Between the parts of JSON: unbounded, hot sampling would fill the output with spaces.
_WHITESPACE = {"json": r"[\x20\x0A\x0D\x09]{1,32}", "call": r"\x20"}


class GrammarError(ValueError):
    """The request's grammar cannot be used. The message says why."""


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """What the user sent: a JSON schema (of a tool call: "call"), a regular expression, a JSON list of choices, or a grammar in
    GBNF/EBNF or Lark."""

    kind: Literal["json", "call", "regex", "choice", "grammar"]
    text: str
    reasoning: Reasoning = "none"  # what may come before


class GrammarObserver(Protocol):
    """Told of what is compiled, for metrics."""

    def on_grammar_compiled(self, seconds: float, is_good: bool) -> None: ...

    def on_grammar_cached(self) -> None: ...


class GrammarService:
    """Compiles one source at a time; the process starts with the first. `observer` may be set at any time."""

    def __init__(self, tokenizer_file: Path, compile_seconds: float = COMPILE_SECONDS) -> None:
        self._tokenizer_file = tokenizer_file
        self._seconds = compile_seconds
        self._cache: OrderedDict[GrammarSource, str | GrammarError] = OrderedDict()
        self._cached_length = 0
        self._lock = asyncio.Lock()
        self.observer: GrammarObserver | None = None
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    async def compile(self, source: GrammarSource) -> str:
        """The grammar for `SamplingParams.grammar`. Raises GrammarError."""
        if len(source.text) > MAX_SOURCE_LENGTH:
            raise GrammarError(f"longer than {MAX_SOURCE_LENGTH} characters")
        if source not in self._cache:
            async with self._lock:
                if source not in self._cache:  # not compiled by another while this one waited
                    await self._compile_anew(source)
        elif self.observer is not None:
            self.observer.on_grammar_cached()
        self._cache.move_to_end(source)
        result = self._cache[source]
        if isinstance(result, GrammarError):
            raise GrammarError(str(result))
        return result

    async def _compile_anew(self, source: GrammarSource) -> None:
        begin = time.monotonic()
        result: str | GrammarError = GrammarError("no process to compile it")
        try:
            result = await asyncio.to_thread(self._compile, source)
            self._remember(source, result)
        finally:
            if self.observer is not None:
                self.observer.on_grammar_compiled(time.monotonic() - begin, not isinstance(result, GrammarError))

    def _remember(self, source: GrammarSource, result: str | GrammarError) -> None:
        self._cache[source] = result
        self._cached_length += len(source.text) + len(str(result))
        while len(self._cache) > _MAX_CACHED or self._cached_length > _MAX_CACHED_LENGTH:
            oldest, forgotten = self._cache.popitem(last=False)
            self._cached_length -= len(oldest.text) + len(str(forgotten))

    def close(self) -> None:
        """Ends the process. The service can go on afterwards, with a new one."""
        if self._process is not None and self._connection is not None:
            self._process.kill()
            self._process.join(2.0)
            self._connection.close()
        self._process = self._connection = None

    def _compile(self, source: GrammarSource) -> str | GrammarError:
        """The error is the grammar's own and will come again; GrammarError is raised for the process that does not start."""
        try:
            connection = self._start()
        except (EOFError, OSError) as error:
            self.close()
            raise GrammarError(f"grammars are not available: {error or 'their process ended'}") from error
        try:
            connection.send((source.kind, source.text, source.reasoning))
            if not connection.poll(self._seconds):
                self.close()
                return GrammarError(f"takes longer than {self._seconds:g} s to compile")
            is_good, text = connection.recv()
        except (EOFError, OSError):
            self.close()
            return GrammarError("takes too much memory to compile")
        return text if is_good else GrammarError(text)

    def _start(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, self._tokenizer_file), name="awq-serve grammars", daemon=True
            )
            self._process.start()
            theirs.close()
            if not self._connection.poll(START_SECONDS):
                raise OSError("the grammar process did not start")
            self._connection.recv()
        return self._connection


def load_grammar_tokenizer(
    file: Path, vocab_size: int | None = None, eos_token_ids: frozenset[int] = frozenset()
) -> llguidance.LLTokenizer:
    """The tokenizer as grammars see it. Raises ValueError for one that they cannot be used with."""
    known = [token_id for token_id in sorted(eos_token_ids) if vocab_size is None or token_id < vocab_size]
    try:
        return llguidance.LLTokenizer(str(file), n_vocab=vocab_size, eos_token=known or None)
    except Exception as error:
        raise ValueError(f"{file}: grammars cannot be used with this tokenizer: {error}") from error


def _serve(connection: Connection, tokenizer_file: Path) -> None:
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    step_back()
    tokenizer = load_grammar_tokenizer(tokenizer_file)
    _limit_memory()
    connection.send("ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            kind, text, reasoning = connection.recv()
            try:
                connection.send((True, _compile(GrammarSource(kind, text, reasoning), tokenizer)))
            except Exception as error:  # users write these programs: whatever is wrong is their text's fault
                connection.send((False, str(error)[:500] or type(error).__name__))


def _limit_memory() -> None:
    """Above what the process has mapped already."""
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MAX_MEMORY, mapped + MAX_MEMORY))


def _compile(source: GrammarSource, tokenizer: llguidance.LLTokenizer) -> str:
    """Raises ValueError."""
    grammar = _after_reasoning(_translate(source), source.reasoning, tokenizer)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    if not matcher.is_error():
        begin = time.thread_time()
        matcher.compute_bitmask()  # the lexer's automata are built by need: here, too, they may fail
        if time.thread_time() - begin > MAX_MASK_SECONDS:
            raise ValueError(f"takes longer than {MAX_MASK_SECONDS:g} s to find the tokens that may come first")
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return grammar


def _translate(source: GrammarSource) -> str:
    if source.kind in _WHITESPACE:
        options = {"whitespace_pattern": _WHITESPACE[source.kind]}
        return llguidance.LLMatcher.grammar_from_json_schema(source.text, defaults=options)
    if source.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(source.text)
    if source.kind == "choice":
        literals = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(source.text))
        return llguidance.LLMatcher.grammar_from_lark(f"start: {literals}")
    try:
        return llguidance.LLMatcher.grammar_from_lark(any_to_lark(source.text))
    except ValueError:
        raise
    except Exception as error:  # the converter trips over what is no grammar in many ways
        raise ValueError(f"not a grammar: {error}") from error


def _after_reasoning(grammar: str, reasoning: Reasoning, tokenizer: llguidance.LLTokenizer) -> str:
    """The grammar, with any text up to THINK_END before it."""
    if reasoning == "none":
        return grammar
    # Of one grammar in Lark's syntax the text is given as it is; else, this is a list of one.
    whole = json.loads(grammar) if grammar.startswith("{") else {"grammars": [{"lark_grammar": grammar}]}
    whole["grammars"][0]["name"] = "answer"
    begin = THINK if _is_token(THINK, tokenizer) else json.dumps(THINK)
    if _is_token(THINK_END, tokenizer):  # which no text stands for; and text that spells it would be taken for it
        thought, terminal = f"THOUGHT {THINK_END}", f"/(?s:.*)/ & ~/(?s:.*{_THINK_END_PATTERN}.*)/"
    else:  # terminals take as much as they can: this one ends with the first end
        thought, terminal = "THOUGHT", f"/(?s:.*{_THINK_END_PATTERN})/ & ~/(?s:.*{_THINK_END_PATTERN}.+)/"
    thought += " /\\n{0,2}/"
    start = f"{thought} @answer" if reasoning == "begun" else f"({begin} {thought})? @answer"
    whole["grammars"].insert(0, {"lark_grammar": f"start: {start}\nTHOUGHT: {terminal}\n"})
    return json.dumps(whole)


def _is_token(tag: str, tokenizer: llguidance.LLTokenizer) -> bool:
    token_ids = tokenizer.tokenize_str(tag)
    return len(token_ids) == 1 and tokenizer.is_special_token(token_ids[0])
