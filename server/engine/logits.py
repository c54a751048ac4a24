"""What one request does to its own row of logits before sampling, and how likely tokens are by the model alone.

Everything here is on one row [vocabulary], in plain tensor operations on the row's device: what a request gets cannot depend on
who shares its step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.types import SamplingParams, TokenLogprob


class Scores:
    """The log softmax of a row, taken before anything changes the row."""

    def __init__(self, row: Tensor, num_top: int) -> None:
        self._logprobs = row.log_softmax(-1)
        values, token_ids = self._logprobs.topk(min(num_top, row.shape[0])) if num_top else (None, None)
        self._top_logprobs: list[float] = [] if values is None else values.tolist()
        self._top_token_ids: list[int] = [] if token_ids is None else token_ids.tolist()

    def of(self, token_id: int) -> TokenLogprob:
        logprob = self._logprobs[token_id]
        rank = 1 + int((self._logprobs > logprob).sum())
        return TokenLogprob(float(logprob), rank, self._top_token_ids, self._top_logprobs)


class LogitRules:
    """A request's rules, in this order: allowed tokens, bad words, bias, repetition, frequency and presence penalties.

    The repetition penalty counts prompt and output, the other two the output alone. `apply` may be called with an output that
    has grown, never with one that has shrunk.
    """

    def __init__(self, sampling: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self._sampling = sampling
        self._prompt_token_ids = prompt_token_ids
        self._penalizes_output = bool(sampling.frequency_penalty or sampling.presence_penalty)
        self._repetition = sampling.repetition_penalty
        self._can_exhaust = sampling.allowed_token_ids is not None or bool(sampling.bad_words)
        self._is_prepared = False
        self._num_counted = 0  # output tokens
        # Made for the first row, whose size and device they take.
        self._counts: Tensor | None = None  # of the output's tokens, fp32 [vocabulary]
        self._seen: Tensor | None = None  # in prompt or output, bool [vocabulary]
        self._disallowed: Tensor | None = None  # bool [vocabulary]
        self._bias: tuple[Tensor, Tensor] | None = None  # token ids, values

    def apply(self, row: Tensor, output: Sequence[int], banned: Sequence[int] = (), is_masked: bool = False) -> bool:
        """Changes `row` in place; `banned` tokens get no probability besides. False when no token is left, which can be when
        tokens are allowed or banned here, or the row comes with some taken out (`is_masked`)."""
        if not self._is_prepared:
            self._prepare(row)
        self._count(row, output)
        if self._disallowed is not None:
            row.masked_fill_(self._disallowed, -torch.inf)
        self._ban(row, [*banned, *self._bad_endings(output)])
        if self._bias is not None:
            row.index_add_(0, *self._bias)
        if self._seen is not None:
            scaled = torch.where(row > 0, row / self._repetition, row * self._repetition)
            torch.where(self._seen, scaled, row, out=row)
        if self._counts is not None:
            row.sub_(self._counts * self._sampling.frequency_penalty)
            row.sub_((self._counts > 0) * self._sampling.presence_penalty)
        return not ((self._can_exhaust or is_masked) and bool(row.max().isneginf()))

    def _prepare(self, row: Tensor) -> None:
        sampling, device, size = self._sampling, row.device, row.shape[0]
        self._is_prepared = True
        if self._penalizes_output:
            self._counts = torch.zeros(size, dtype=torch.float32, device=device)
        if self._repetition != 1.0:
            self._seen = torch.zeros(size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(self._prompt_token_ids, device=device)] = True
        if sampling.allowed_token_ids is not None:
            self._disallowed = torch.ones(size, dtype=torch.bool, device=device)
            self._disallowed[torch.tensor(sampling.allowed_token_ids, device=device)] = False
        if sampling.logit_bias:
            token_ids, values = zip(*sampling.logit_bias, strict=True)
            self._bias = torch.tensor(token_ids, device=device), torch.tensor(values, device=device)

    def _count(self, row: Tensor, output: Sequence[int]) -> None:
        new = output[self._num_counted :]
        self._num_counted = len(output)
        if not new or (self._counts is None and self._seen is None):
            return
        token_ids = torch.tensor(new, device=row.device)
        if self._counts is not None:
            self._counts.index_add_(0, token_ids, torch.ones(len(new), device=row.device))
        if self._seen is not None:
            self._seen[token_ids] = True

    def _bad_endings(self, output: Sequence[int]) -> list[int]:
        """Tokens that would complete a bad word."""
        endings = []
        for word in self._sampling.bad_words:
            length = len(word) - 1
            if length <= len(output) and list(output[len(output) - length :]) == list(word[:-1]):
                endings.append(word[-1])
        return endings

    @staticmethod
    def _ban(row: Tensor, token_ids: list[int]) -> None:
        token_ids = [token_id for token_id in token_ids if token_id < row.shape[0]]
        if token_ids:
            row[torch.tensor(token_ids, device=row.device)] = -torch.inf
