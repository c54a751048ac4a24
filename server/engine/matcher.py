"""Grammars in the engine: where in its grammar an output is, and which tokens may come next."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import llguidance
import numpy as np
import torch
from torch import Tensor

from server.grammar import load_grammar_tokenizer

_MAX_CACHED = 64  # grammars in their starting state


class GrammarMatcher:
    """One output's place in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    @property
    def error(self) -> str:
        """Why the grammar cannot go on; empty while it can."""
        return self._matcher.get_error()

    @property
    def is_complete(self) -> bool:
        """Nothing but the end can follow."""
        return self._matcher.is_stopped()

    def accept(self, token_id: int) -> bool:
        """Moves on by one output token. False when the grammar has failed; `error` says why."""
        return self._matcher.consume_token(token_id)

    def mask(self, row: Tensor) -> bool:
        """Takes every token that may not come next out of a row of logits, in place. False when the grammar has failed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self.error:
            return False
        allowed = np.unpackbits(bits, bitorder="little")[: row.shape[0]]
        banned = torch.from_numpy(allowed == 0)
        row[: len(allowed)].masked_fill_(banned.to(row.device), -torch.inf)
        row[len(allowed) :] = -torch.inf
        return True


class GrammarFactory:
    """Starts matchers for one tokenizer, which loads in the background."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._load = lambda: load_grammar_tokenizer(tokenizer_file, vocab_size, eos_token_ids)
        # In the background: reading a large vocabulary takes a second, and few servers are asked for grammars at once.
        self._loading: Future[llguidance.LLTokenizer] = ThreadPoolExecutor(1, "grammar-tokenizer").submit(self._load)
        self._cache: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def start(self, grammar: str) -> GrammarMatcher:
        """Raises ValueError for a grammar that is not one: `server.grammar` has made sure that it is."""
        matcher = self._cache.pop(grammar, None)
        if matcher is None:
            if self._loading.exception() is not None:  # the file may have been made since
                self._loading = Future()
                self._loading.set_result(self._load())
            matcher = llguidance.LLMatcher(self._loading.result(), grammar, log_level=0)
            if matcher.is_error():
                raise ValueError(f"the grammar cannot be used: {matcher.get_error()}")
        self._cache[grammar] = matcher
        if len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)
        return GrammarMatcher(matcher.deep_copy())
