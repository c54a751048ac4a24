"""A request inside the engine: its tokens, its blocks, and the counters from which all else derives."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from server.types import (
    FinishReason,
    GenerateRequest,
    Pooling,
    PoolRequest,
    RequestTimings,
    SamplingParams,
    TokenLogprob,
)

if TYPE_CHECKING:  # all but the drafter need torch, which nothing else here does
    from server.engine.drafts import Drafter
    from server.engine.logits import LogitRules
    from server.engine.matcher import GrammarMatcher
    from server.engine.pooling import PooledStates


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` is the prompt followed by the output. The first `num_computed_tokens` have their keys and values in the blocks
    of `block_table`; block i holds positions i * block_size on."""

    request: GenerateRequest | PoolRequest
    seed: int
    token_ids: list[int]
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache supplied at the first admission
    num_preemptions: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks hashed so far
    status: SequenceStatus = SequenceStatus.WAITING
    first_scheduled: float | None = None
    first_token: float | None = None
    rules: LogitRules | None = None  # made by the sampler where the request has any
    matcher: GrammarMatcher | None = None
    drafter: Drafter | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of prompt tokens 1 on, as far as computed
    pooled: PooledStates | None = None  # of a prompt to embed, as far as computed
    rank: tuple[float, int] = (0.0, 0)  # the scheduler's: the lesser goes first
    has_rules: bool = field(init=False)

    def __post_init__(self) -> None:
        assert self.token_ids, "a sequence has at least one prompt token"
        assert 0 <= self.num_computed_tokens <= len(self.token_ids)
        self.has_rules = isinstance(self.request, GenerateRequest) and self.request.sampling.changes_logits

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        assert isinstance(self.request, GenerateRequest), "what is embedded is not sampled"
        return self.request.sampling

    @property
    def pooling(self) -> Pooling | None:
        """How the prompt is embedded; None for sequences that generate."""
        return self.request.pooling if isinstance(self.request, PoolRequest) else None

    @property
    def group_id(self) -> str:
        return self.request.group_id if isinstance(self.request, GenerateRequest) else ""

    @property
    def needs_every_position(self) -> bool:
        """What the prefix cache holds is not computed, and so can be neither scored nor averaged."""
        return self.pooling is Pooling.MEAN or self.num_unscored_tokens > 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    def num_tokens_left(self, max_model_len: int) -> int:
        """Output tokens that may still come."""
        return min(self.sampling.max_tokens - self.num_output_tokens, max_model_len - self.num_tokens)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_unscored_tokens(self) -> int:
        """Prompt tokens whose log probabilities are asked for and not known yet."""
        if self.pooling is not None or self.sampling.num_prompt_logprobs is None:
            return 0
        return self.num_prompt_tokens - 1 - len(self.prompt_logprobs)

    @property
    def is_decoding(self) -> bool:
        """Only the newest token is left to compute: the next step samples one."""
        return self.num_uncomputed_tokens == 1

    def finish_reason(self, max_model_len: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Whether the newest output token ends the sequence."""
        sampling, token = self.sampling, self.token_ids[-1]
        if self.matcher is not None and self.matcher.is_complete:
            return FinishReason.STOP
        if self.num_output_tokens >= sampling.min_tokens:
            if token in sampling.stop_token_ids:
                return FinishReason.STOP
            if not sampling.ignore_eos and token in eos_token_ids:
                return FinishReason.STOP
        if self.num_output_tokens >= sampling.max_tokens or self.num_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None

    def stop_token_id(self, eos_token_ids: frozenset[int]) -> int | None:
        """The newest token where it is one that ends outputs, and is no part of their text."""
        token = self.token_ids[-1]
        return token if token in eos_token_ids or token in self.sampling.stop_token_ids else None

    def timings(self, now: float) -> RequestTimings:
        return RequestTimings(
            self.request.arrival_time, self.first_scheduled, self.first_token, now, self.num_preemptions
        )
