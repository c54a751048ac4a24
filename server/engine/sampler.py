"""From sequences to the per-row sampling parameters that the back end reads, and the rules that come before it."""

from __future__ import annotations

from collections.abc import Sequence as Rows

from torch import Tensor

from kernels.backend import Backend
from kernels.batch import SamplingBatch
from server.engine.logits import LogitRules
from server.engine.sequence import Sequence
from server.engine.step import SamplingRow
from server.engine.token_mask import TokenMask

NOTHING_LEFT = "allowed_token_ids, bad_words, min_tokens and the grammar together leave no token to choose from"


class Sampler:
    """Fills the sampling buffers. What a row samples depends on its logits, its sequence's parameters and history alone, its
    drafts included."""

    def __init__(self, backend: Backend, batch: SamplingBatch, eos_token_ids: frozenset[int]) -> None:
        self.backend = backend
        self.batch = batch
        self.eos_token_ids = eos_token_ids

    def fill(self, rows: Rows[SamplingRow]) -> SamplingBatch:
        """Before the program runs, which takes the buffers to the device."""
        params = [row.sequence.sampling for row in rows]
        self.batch.fill(
            temperature=[p.temperature for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            seed=[row.sequence.seed for row in rows],
            index=[row.num_output_tokens for row in rows],
            typical_p=[p.typical_p for p in params],
        )
        return self.batch

    def apply_rules(self, rows: Rows[SamplingRow], logits: Tensor) -> dict[int, str]:
        """Changes `logits` [rows, vocabulary] in place where the sequences' rules ask; a sequence's rows stand together, in order.
        Returns, by row, why nothing is left to choose from where that is so. Waits for nothing: what is left is told from the
        rules, not from the logits."""
        vocab_size = logits.shape[1]
        errors: dict[int, str] = {}
        biases: list[tuple[int, int, float]] = []
        adjustments: list[tuple[int, SamplingRow, TokenMask | None]] = []
        masks = self._grammar_masks(rows, vocab_size)
        for index, row in enumerate(rows):
            sequence = row.sequence
            allowed: TokenMask | None = None
            bias: dict[int, float] = {}
            banned = self._banned(row)
            if sequence.matcher is None and not sequence.has_rules and not banned:
                continue  # nearly every row of nearly every step
            if sequence.matcher is not None:
                allowed = masks[index]
                if allowed is None:
                    errors[index] = f"the grammar cannot go on: {sequence.matcher.error}"
                    continue
                if not allowed.has_any_besides(banned):
                    banned = []  # a grammar that has come to its end has nothing else to give
            if sequence.has_rules:
                rules = self._rules(sequence, vocab_size)
                bias = rules.bias(row.output)
                if rules.allowed is not None:
                    allowed = rules.allowed if allowed is None else allowed & rules.allowed
            bias |= dict.fromkeys(banned, -float("inf"))
            if not _leaves_any(allowed, bias, vocab_size):
                errors[index] = NOTHING_LEFT
                continue
            biases += [(index, token_id, value) for token_id, value in bias.items()]
            if sequence.has_rules or allowed is not None:
                adjustments.append((index, row, allowed))
        if biases:
            self.backend.add_bias(logits, *zip(*biases, strict=True))
        for index, row, allowed in adjustments:
            # Only now: a sequence's rows share their history, which each brings to its own state.
            rules_of_row = row.sequence.rules
            penalties = None if rules_of_row is None else rules_of_row.penalties(row.output, len(row.drafts))
            if penalties is not None or allowed is not None:
                self.backend.adjust_row(logits[index], penalties, None if allowed is None else allowed.to_tensor())
        return errors

    @staticmethod
    def _grammar_masks(rows: Rows[SamplingRow], vocab_size: int) -> dict[int, TokenMask | None]:
        """By row, what the sequence's grammar allows after its drafts; None where it has failed. Matchers are as before after."""
        masks: dict[int, TokenMask | None] = {}
        for index, row in enumerate(rows):
            matcher = row.sequence.matcher
            if matcher is None:
                continue
            if row.drafts and not matcher.error:
                matcher.accept(row.drafts[-1])  # drafts are cut to what the grammar takes
            # Nothing follows a grammar's end, and nobody will ask for the row.
            has_ended = matcher.is_complete and not matcher.error
            masks[index] = TokenMask.of((), vocab_size) if has_ended else matcher.allowed(vocab_size)
            is_last = index + 1 == len(rows) or rows[index + 1].sequence is not row.sequence
            if is_last and not matcher.error:
                matcher.rewind(len(row.drafts))
        return masks

    def _rules(self, sequence: Sequence, vocab_size: int) -> LogitRules:
        if sequence.rules is None:
            prompt = sequence.request.prompt_token_ids
            sequence.rules = LogitRules(sequence.sampling, prompt, vocab_size, self.backend)
        return sequence.rules

    def _banned(self, row: SamplingRow) -> list[int]:
        """Tokens that would end the output before `min_tokens`."""
        sampling = row.sequence.sampling
        if row.num_output_tokens >= sampling.min_tokens:
            return []
        return sorted(self.eos_token_ids | set(sampling.stop_token_ids))


def _leaves_any(allowed: TokenMask | None, bias: dict[int, float], vocab_size: int) -> bool:
    """Whether a token may come at all."""
    banned = [token_id for token_id, value in bias.items() if value == -float("inf")]
    if allowed is not None:
        return allowed.has_any_besides(banned)
    return sum(token_id < vocab_size for token_id in banned) < vocab_size
