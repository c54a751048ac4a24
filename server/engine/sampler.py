"""From sequences to the per-row sampling parameters that the back end reads, and the rules that come before it."""

from __future__ import annotations

from collections.abc import Sequence as Rows

from torch import Tensor

from kernels.backend import Backend, Penalties
from kernels.batch import SamplingBatch
from server.engine.logits import LogitRules
from server.engine.sequence import Sequence
from server.engine.token_mask import TokenMask

NOTHING_LEFT = "allowed_token_ids, bad_words, min_tokens and the grammar together leave no token to choose from"


class Sampler:
    """Fills the sampling buffers. What a row samples depends on its logits, its sequence's parameters and history alone."""

    def __init__(self, backend: Backend, batch: SamplingBatch, eos_token_ids: frozenset[int]) -> None:
        self.backend = backend
        self.batch = batch
        self.eos_token_ids = eos_token_ids

    def fill(self, sequences: Rows[Sequence]) -> SamplingBatch:
        """One row per sequence, for its next token. Before the program runs, which takes the buffers to the device."""
        params = [sequence.sampling for sequence in sequences]
        self.batch.fill(
            temperature=[p.temperature for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            seed=[sequence.seed for sequence in sequences],
            index=[sequence.num_output_tokens for sequence in sequences],
        )
        return self.batch

    def apply_rules(self, sequences: Rows[Sequence], logits: Tensor) -> dict[int, str]:
        """Changes `logits` [rows, vocabulary] in place where the sequences' rules ask. Returns, by row, why nothing is left to
        choose from where that is so. Waits for nothing: what is left is told from the rules, not from the logits."""
        vocab_size = logits.shape[1]
        errors: dict[int, str] = {}
        biases: list[tuple[int, int, float]] = []
        adjustments: list[tuple[int, Penalties | None, TokenMask | None]] = []
        for row, sequence in enumerate(sequences):
            allowed, bias, penalties = None, {}, None
            banned = self._banned(sequence)
            if sequence.matcher is None and not sequence.has_rules and not banned:
                continue  # nearly every row of nearly every step
            if sequence.matcher is not None:
                allowed = sequence.matcher.allowed(vocab_size)
                if allowed is None:
                    errors[row] = f"the grammar cannot go on: {sequence.matcher.error}"
                    continue
                if not allowed.has_any_besides(banned):
                    banned = []  # a grammar that has come to its end has nothing else to give
            if sequence.has_rules:
                rules = self._rules(sequence, vocab_size)
                output = sequence.token_ids[sequence.num_prompt_tokens :]
                bias, penalties = rules.bias(output), rules.penalties(output)
                if rules.allowed is not None:
                    allowed = rules.allowed if allowed is None else allowed & rules.allowed
            bias |= dict.fromkeys(banned, -float("inf"))
            if not _leaves_any(allowed, bias, vocab_size):
                errors[row] = NOTHING_LEFT
                continue
            biases += [(row, token_id, value) for token_id, value in bias.items()]
            if penalties is not None or allowed is not None:
                adjustments.append((row, penalties, allowed))
        if biases:
            self.backend.add_bias(logits, *zip(*biases, strict=True))
        for row, penalties, allowed in adjustments:
            self.backend.adjust_row(logits[row], penalties, None if allowed is None else allowed.to_tensor())
        return errors

    def _rules(self, sequence: Sequence, vocab_size: int) -> LogitRules:
        if sequence.rules is None:
            prompt = sequence.request.prompt_token_ids
            sequence.rules = LogitRules(sequence.sampling, prompt, vocab_size, self.backend)
        return sequence.rules

    def _banned(self, sequence: Sequence) -> list[int]:
        """Tokens that would end the output before `min_tokens`."""
        if sequence.num_output_tokens >= sequence.sampling.min_tokens:
            return []
        return sorted(self.eos_token_ids | set(sequence.sampling.stop_token_ids))


def _leaves_any(allowed: TokenMask | None, bias: dict[int, float], vocab_size: int) -> bool:
    """Whether a token may come at all."""
    banned = [token_id for token_id, value in bias.items() if value == -float("inf")]
    if allowed is not None:
        return allowed.has_any_besides(banned)
    return sum(token_id < vocab_size for token_id in banned) < vocab_size
