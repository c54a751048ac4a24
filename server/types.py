"""The engine protocol: all that passes between the API process and the engine process.

Plain dataclasses of plain values: no tensors, no text. `GenerateRequest` is what `server.api.parse` makes of a valid HTTP
request; past it no invalid request exists. All times are seconds of CLOCK_MONOTONIC, which both processes share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class FinishReason(str, Enum):
    """Every way a request ends: the API's `finish_reason` and a metric label."""

    STOP = "stop"  # end-of-sequence token, stop token id, or a stop string seen at the edge
    LENGTH = "length"  # max_tokens or the context is used up
    ABORT = "abort"  # the client left, or an operator aborted it
    TIMEOUT = "timeout"  # its deadline passed
    ERROR = "error"  # the engine could not go on with it; the message says why


class AbortReason(str, Enum):
    """Why the edge ends a request early."""

    CLIENT = "client"  # disconnect: FinishReason.ABORT
    STOP_STRING = "stop_string"  # FinishReason.STOP

    @property
    def finish_reason(self) -> FinishReason:
        return FinishReason.STOP if self is AbortReason.STOP_STRING else FinishReason.ABORT


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Validated by the edge; see the API reference for ranges.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and typical_p 1 are off; seed None has one drawn at admission.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # as token ids
    num_logprobs: int | None = None  # of the most likely tokens told with each output token; None: no log probabilities
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens
    grammar: str | None = None  # what `server.grammar` made of the request's: the output, max_tokens aside, follows it

    @property
    def changes_logits(self) -> bool:
        """Whether anything but sampling itself and `min_tokens` stands between the model's logits and the choice."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.allowed_token_ids is not None
            or self.bad_words
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model found one token: natural logarithms of its probabilities, before any rule or temperature."""

    logprob: float
    rank: int  # 1: no token is likelier
    top_token_ids: list[int]  # the likeliest, best first
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate. n > 1 is several requests that share a `group_id`, whose common prompt blocks are computed once.

    `cache_key` separates prefix caches (salt, adapter). Lower `priority` goes first. `deadline`: monotonic seconds, or None.
    `alone`: it goes before all others and shares no step with them until it has its first token. `client`: the API key's name;
    clients take turns.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_time: float
    group_id: str = ""
    cache_key: str = ""
    priority: int = 0
    deadline: float | None = None
    alone: bool = False
    client: str = ""


class Pooling(str, Enum):
    """Which of a prompt's final hidden states make its embedding."""

    MEAN = "mean"  # their mean
    LAST = "last"  # the last token's


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """One prompt to embed: its pooled hidden states, at unit length. The other fields are as in GenerateRequest."""

    request_id: str
    prompt_token_ids: list[int]
    pooling: Pooling
    arrival_time: float
    cache_key: str = ""
    priority: int = 0
    deadline: float | None = None
    alone: bool = False
    client: str = ""


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """The engine stops the request at the next step and answers its last TokenEvent with the reason's finish reason."""

    request_id: str
    reason: AbortReason


@dataclass(frozen=True, slots=True)
class Shutdown:
    """With `drain`, running and waiting requests finish first; else they end with FinishReason.ABORT."""

    drain: bool


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """Monotonic seconds. `first_scheduled` and `first_token` are None where the request ended before."""

    arrival: float
    first_scheduled: float | None
    first_token: float | None
    finished: float
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step did for one request: usually one token, none for a bare end, more where drafts were accepted.

    `finish_reason` is set exactly once, on the request's last event. `timings` come with that and with the first token, whose
    `finished` is the time of that event. `stop_token_id` is the token that
    ended it (the end-of-sequence token included); that token is the last of `token_ids`. `num_cached_tokens` (prompt tokens found
    in the prefix cache) is right from the first event on. `logprobs` has one entry per token where the request asks for them.
    `prompt_logprobs` comes with the first token and has one entry per prompt token but the first, which nothing predicts.
    With `is_request_fault`, `error` is something that the request brought about; `is_non_finite` says that the model's numbers
    were no numbers. `embedding` is the one answer to a PoolRequest.
    """

    request_id: str
    token_ids: list[int]
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    timings: RequestTimings | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    is_request_fault: bool = False
    is_non_finite: bool = False
    embedding: list[float] | None = None


@dataclass(frozen=True, slots=True)
class StepStats:
    """The engine after a step. Block counts satisfy free + used + cached == total; the token counts are this step's alone."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_used_blocks: int
    num_cached_blocks: int
    num_prompt_tokens: int = 0  # of the requests that gave their first token in this step
    num_generation_tokens: int = 0
    num_prefix_queries: int = 0  # prompt tokens of requests admitted in this step, and
    num_prefix_hits: int = 0  # how many of those the prefix cache held
    num_preemptions: int = 0
    step_seconds: float = 0.0
    num_drafts: int = 0  # sequences that had tokens drafted in this step,
    num_draft_tokens: int = 0  # how many tokens together, and
    num_accepted_per_position: list[int] = field(default_factory=list)  # of how many the first, second... was right


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One message per engine step."""

    epoch: int
    events: list[TokenEvent]
    stats: StepStats


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine says once, when it is ready to serve."""

    epoch: int
    max_model_len: int
    num_blocks: int
    block_size: int
    backend: str
    notes: list[str] = field(default_factory=list)  # human-readable lines: memory split, chosen kernels, fallbacks


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """The engine process cannot start or go on. Every unfinished request counts as ended with FinishReason.ERROR."""

    epoch: int
    error: str


EngineInput = GenerateRequest | PoolRequest | AbortRequest | Shutdown
EngineOutput = StepOutput | EngineInfo | EngineFailure
