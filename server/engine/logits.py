"""What one request does to its own row of logits before sampling, and how likely tokens are by the model alone.

A row's rules are data for the back end: what a request gets cannot depend on who shares its step, and nothing here waits for the
device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import PROMPT_FLAG, Backend, Penalties
from server.engine.token_mask import TokenMask
from server.types import SamplingParams, TokenLogprob


class Scores:
    """The log softmax of a row, taken before anything changes the row. Only `of` waits for it."""

    def __init__(self, row: Tensor, num_top: int) -> None:
        self._logprobs = row.log_softmax(-1)
        self._top = self._logprobs.topk(min(num_top, row.shape[0])) if num_top else None

    def of(self, token_id: int) -> TokenLogprob:
        logprob = self._logprobs[token_id]
        rank = 1 + int((self._logprobs > logprob).sum())
        if self._top is None:
            return TokenLogprob(float(logprob), rank, [], [])
        return TokenLogprob(float(logprob), rank, self._top.indices.tolist(), self._top.values.tolist())


class LogitRules:
    """A request's rules, in this order: bad words and bias; repetition, frequency and presence penalties; allowed tokens.

    The repetition penalty counts prompt and output, the other two the output alone.
    """

    def __init__(
        self, sampling: SamplingParams, prompt_token_ids: Sequence[int], vocab_size: int, backend: Backend
    ) -> None:
        self._sampling = sampling
        self._bias = dict(sampling.logit_bias)
        self.allowed: TokenMask | None = None
        if sampling.allowed_token_ids is not None:
            self.allowed = TokenMask.of(sampling.allowed_token_ids, vocab_size)
        self._penalties: Penalties | None = None
        if sampling.repetition_penalty != 1.0 or sampling.frequency_penalty or sampling.presence_penalty:
            self._penalties = self._new_penalties(backend, prompt_token_ids, vocab_size)
        # The history's tokens: the first ones of the output, and those after them, which may have been drafts.
        self._num_settled = 0
        self._unsettled: list[int] = []

    def bias(self, output: Sequence[int]) -> dict[int, float]:
        """What to add to which token's logit after this output; -inf to those that would complete a bad word."""
        bias = dict(self._bias)
        for word in self._sampling.bad_words:
            length = len(word) - 1
            if length <= len(output) and list(output[len(output) - length :]) == list(word[:-1]):
                bias[word[-1]] = -float("inf")
        return bias

    def penalties(self, output: Sequence[int], num_drafts: int = 0) -> Penalties | None:
        """Of this output, whose last tokens may be drafts; what is none stays part of the output in later calls."""
        if self._penalties is not None:
            unsettled = list(output[self._num_settled :])
            num_equal = 0
            while num_equal < min(len(unsettled), len(self._unsettled)):
                if unsettled[num_equal] != self._unsettled[num_equal]:
                    break
                num_equal += 1
            for token_id in self._unsettled[num_equal:]:
                self._penalties.history.narrow(0, token_id, 1).sub_(1)
            for token_id in unsettled[num_equal:]:
                self._penalties.history.narrow(0, token_id, 1).add_(1)
            num_new = len(unsettled) - num_drafts
            self._num_settled += num_new
            self._unsettled = unsettled[num_new:]
        return self._penalties

    def _new_penalties(self, backend: Backend, prompt_token_ids: Sequence[int], vocab_size: int) -> Penalties:
        sampling = self._sampling
        history = torch.zeros(vocab_size, dtype=torch.int32)
        if sampling.repetition_penalty != 1.0:
            history[torch.tensor(prompt_token_ids)] = PROMPT_FLAG
        return backend.prepare_penalties(
            history, sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        )
