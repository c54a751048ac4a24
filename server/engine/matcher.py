"""Grammars in the engine: where in its grammar an output is, and which tokens may come next."""

from __future__ import annotations

import time
from collections import OrderedDict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import llguidance

from server.engine.sequence import Sequence
from server.engine.token_mask import TokenMask
from server.grammar import MAX_MASK_SECONDS, load_grammar_tokenizer
from server.priority import step_back

_MAX_CACHED = 64  # grammars in their starting state

# Of the processor, for one token of one output. Grammars whose first token takes long have been refused; this is for those that get
# worse.
_MOST_SECONDS = 4 * MAX_MASK_SECONDS


class GrammarMatcher:
    """One output's place in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        self._is_slow = False

    @property
    def error(self) -> str:
        """Why the grammar cannot go on; empty while it can."""
        if self._is_slow:
            return f"the grammar takes longer than {_MOST_SECONDS:g} s to find the tokens that may come next"
        return self._matcher.get_error()

    @property
    def is_complete(self) -> bool:
        """Nothing but the end can follow."""
        return self._matcher.is_stopped()

    def accept(self, token_id: int) -> bool:
        """Moves on by one output token. False when the grammar has failed; `error` says why."""
        return self._matcher.consume_token(token_id)

    def num_valid(self, token_ids: list[int]) -> int:
        """How many of these, from the first on, may come one after the other."""
        return self._matcher.validate_tokens(token_ids)

    def rewind(self, num_tokens: int) -> None:
        """Takes back the last tokens that were accepted."""
        if num_tokens:
            is_back = self._matcher.rollback(num_tokens)
            assert is_back, self.error

    def allowed(self, vocab_size: int) -> TokenMask | None:
        """The tokens that may come next. None when the grammar has failed."""
        begin = time.thread_time()
        bits = self._matcher.compute_bitmask()
        self._is_slow = time.thread_time() - begin > _MOST_SECONDS
        return None if self.error else TokenMask.from_bytes(bits, vocab_size)


class GrammarFactory:
    """Starts matchers for one tokenizer. Reading a vocabulary takes a second, and compiling a grammar up to several: a thread
    does both, without the interpreter lock."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._load = lambda: load_grammar_tokenizer(tokenizer_file, vocab_size, eos_token_ids)
        self._thread = ThreadPoolExecutor(1, "grammars", initializer=step_back)
        # Of the thread alone:
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._cache: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def start(self, grammar: str) -> Future[GrammarMatcher]:
        """The future's exception is for a grammar that is not one: `server.grammar` has made sure that it is."""
        return self._thread.submit(self._start, grammar)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self, grammar: str) -> GrammarMatcher:
        if self._tokenizer is None:
            self._tokenizer = self._load()
        matcher = self._cache.pop(grammar, None)
        if matcher is None:
            matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
            if matcher.is_error():
                raise ValueError(f"the grammar cannot be used: {matcher.get_error()}")
        self._cache[grammar] = matcher
        if len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)
        return GrammarMatcher(matcher.deep_copy())


class GrammarQueue:
    """Sequences whose matchers are under way. Nobody else waits for them."""

    def __init__(self, factory: GrammarFactory) -> None:
        self._factory = factory
        self._pending: dict[str, tuple[Sequence, Future[GrammarMatcher]]] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, sequence: Sequence) -> None:
        assert sequence.sampling.grammar is not None
        self._pending[sequence.request_id] = sequence, self._factory.start(sequence.sampling.grammar)

    def remove(self, request_id: str) -> Sequence | None:
        """The sequence, which is not to be waited for any more; None where it is not here."""
        pending = self._pending.pop(request_id, None)
        return None if pending is None else pending[0]

    def take_late(self, now: float) -> list[Sequence]:
        """Those whose deadline has passed: they wait for nothing any more."""
        late = [
            sequence
            for sequence, _ in self._pending.values()
            if sequence.request.deadline is not None and sequence.request.deadline <= now
        ]
        for sequence in late:
            del self._pending[sequence.request_id]
        return late

    def take_ready(self, seconds: float) -> list[tuple[Sequence, str | None]]:
        """Those that have their matcher, or the reason why they get none. Waits up to `seconds` for one of them."""
        if not self._pending:
            return []
        wait([future for _, future in self._pending.values()], seconds, FIRST_COMPLETED)
        ready: list[tuple[Sequence, str | None]] = []
        for request_id, (sequence, future) in list(self._pending.items()):
            if not future.done():
                continue
            del self._pending[request_id]
            error = future.exception()
            if error is None:
                sequence.matcher = future.result()
            ready.append((sequence, None if error is None else str(error)))
        return ready

    def close(self) -> None:
        self._factory.close()
