"""Runs a `GenerationJob` on the engine: fans prompts out into choices, turns events into text, stops at stop strings."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from server.api.context import ApiContext
from server.api.errors import RequestError
from server.api.parse import GenerationJob, PromptJob
from server.api.prompts import log_prompts
from server.api.responses import PromptTokensDetails, RequestMetrics, Usage
from server.engine.client import EngineClient, Mailbox
from server.record import Generated, current_key, note_generated
from server.text import Detokenizer, StopStrings, Tokenizer
from server.types import AbortReason, FinishReason, GenerateRequest, RequestTimings, TokenEvent, TokenLogprob

# Tokens of a stream, alternatives (logprobs) included, that may wait for its reader: of all choices, or of each.
_MOST_UNREAD = 100_000
_MOST_UNREAD_STEPS = 500


def _most_unread(job: GenerationJob) -> int:
    num_choices = len(job.prompts) * job.num_choices
    return max(_MOST_UNREAD, _MOST_UNREAD_STEPS * num_choices * (1 + (job.sampling.num_logprobs or 0)))


@dataclass(slots=True)
class Delta:
    """What a choice gained since its last delta. Read the choice's state before asking for more deltas."""

    choice: Choice
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one per token id, where the job asks for them


class Choice:
    """One output: index and prompt, and what is known of it so far."""

    def __init__(
        self, index: int, request_id: str, prompt: PromptJob, job: GenerationJob, tokenizer: Tokenizer
    ) -> None:
        self.index = index
        self.request_id = request_id
        self.prompt = prompt
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.prompt_logprobs: list[TokenLogprob] | None = None  # until they come, with the first token
        self.timings: RequestTimings | None = None  # from the first token on
        self._sampling = job.sampling
        self._include_stop = job.include_stop
        self._detokenizer = Detokenizer(tokenizer, prompt.token_ids, job.skip_special_tokens)
        self._stop_strings = StopStrings(job.stop_strings, job.include_stop)

    def accept(self, event: TokenEvent) -> Delta:
        """The delta that an event makes. A stop string ends the choice at the token that completes it; the rest is dropped."""
        self.num_cached_tokens = event.num_cached_tokens
        self.timings = event.timings or self.timings
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if not self.prompt.max_tokens:  # only the prompt was to be scored
            self.finish_reason = FinishReason.LENGTH if event.token_ids else event.finish_reason
            return Delta(self, "", [])
        logprobs = event.logprobs or []
        text = ""
        for position, token_id in enumerate(event.token_ids):
            self.num_tokens += 1
            is_stop_token = event.stop_token_id is not None and position == len(event.token_ids) - 1
            if not is_stop_token or self._include_stop:
                text += self._show(self._detokenizer.feed((token_id,)))
            if self._stop_strings.matched is not None:
                length = position + 1
                return self._finish(FinishReason.STOP, text, event.token_ids[:length], logprobs[:length])
        if event.finish_reason is None:
            return Delta(self, text, event.token_ids, logprobs)
        text += self._show(self._detokenizer.finish())
        if event.stop_token_id in self._sampling.stop_token_ids:
            self.stop_reason = event.stop_token_id
        return self._finish(event.finish_reason, text + self._stop_strings.finish(), event.token_ids, logprobs)

    def end_now(self) -> None:
        """At a stop string, of which the engine does not know yet."""
        if self.timings is not None:
            self.timings = replace(self.timings, finished=time.monotonic())

    def _show(self, piece: str) -> str:
        """Text past the stop strings; those do not count in the first `min_tokens` tokens."""
        if self.num_tokens <= self._sampling.min_tokens:
            return piece
        return self._stop_strings.feed(piece)

    def _finish(self, reason: FinishReason, text: str, token_ids: list[int], logprobs: list[TokenLogprob]) -> Delta:
        self.finish_reason = reason
        if self._stop_strings.matched is not None:
            self.finish_reason = FinishReason.STOP
            self.stop_reason = self._stop_strings.matched
        return Delta(self, text, token_ids, logprobs)


class _BoundedMailbox(Mailbox):
    """Of a stream, whose client may read slower than the engine writes: what waits for it is bounded.

    Past the bound everything ends with an error, and `on_full` is called.
    """

    def __init__(self, most: int, on_full: Callable[[], None]) -> None:
        super().__init__()
        self._most = most
        self._on_full = on_full
        self._waiting = 0  # tokens, and alternatives to them
        self._is_full = False

    def put(self, event: TokenEvent) -> None:
        if self._is_full:
            return
        self._waiting += len(event.token_ids) + sum(len(entry.top_token_ids) for entry in event.logprobs or ())
        self._is_full = self._waiting > self._most
        if not self._is_full:
            super().put(event)
            return
        message = f"the client is more than {self._most} tokens behind"
        super().put(
            TokenEvent(event.request_id, [], finish_reason=FinishReason.ERROR, error=message, is_request_fault=True)
        )
        self._on_full()

    async def get(self) -> list[TokenEvent]:
        events = await super().get()
        self._waiting = 0
        return events


class Generation:
    """All choices of one HTTP request. Choice `prompt_index * n + i` is the i-th of its prompt.

    `start` submits, `deltas` yields until all choices are finished, and `close` aborts what is not: call it however the
    response ends.
    """

    def __init__(self, job: GenerationJob, context: ApiContext, id_prefix: str) -> None:
        self.job = job
        self.id = f"{id_prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._engine: EngineClient = context.engine
        self.tokenizer = context.tokenizer
        self._admission = context.admission
        self._num_logged_characters = context.num_logged_characters
        self._mailbox = _BoundedMailbox(_most_unread(job), self._abort_all) if job.stream else Mailbox()
        self.choices = [
            Choice(
                prompt_index * job.num_choices + choice_index,
                f"{self.id}-{prompt_index}-{choice_index}",
                prompt,
                job,
                context.tokenizer,
            )
            for prompt_index, prompt in enumerate(job.prompts)
            for choice_index in range(job.num_choices)
        ]
        scores_prompt = job.sampling.num_prompt_logprobs is not None
        self._unfinished = {
            choice.request_id: choice for choice in self.choices if choice.prompt.max_tokens > 0 or scores_prompt
        }

    def start(self) -> None:
        """Raises RequestError when the engine has too many, EngineUnavailable when it takes none, RequestRefused for one that it is
        not to get again."""
        note_generated(self.generated)
        self._admission.check(
            len(self._unfinished), sum(len(choice.prompt.token_ids) for choice in self._unfinished.values())
        )
        if self._num_logged_characters is not None:
            log_prompts(
                self.tokenizer,
                self.id,
                [prompt.token_ids for prompt in self.job.prompts],
                self._num_logged_characters,
                self.job.sampling,
            )
        try:
            self._submit_all()
        except Exception:
            self.close()  # those that were taken
            raise

    def _submit_all(self) -> None:
        arrival = time.monotonic()
        for choice in self._unfinished.values():
            prompt_index, choice_index = divmod(choice.index, self.job.num_choices)
            request = GenerateRequest(
                choice.request_id,
                choice.prompt.token_ids,
                self.job.sampling_of(choice.prompt, choice_index),
                arrival,
                group_id=f"{self.id}-{prompt_index}" if self.job.num_choices > 1 else "",
                cache_key=self.job.cache_key,
                priority=self.job.priority,
                deadline=None if self.job.timeout is None else arrival + self.job.timeout,
                client=current_key(),
            )
            self._engine.submit(request, self._mailbox)

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What each wake-up brings: one delta per choice, of one step, or of more when the reader is slower than the engine.

        Raises RequestError when a choice fails.
        """
        for choice in self.choices:
            if choice.request_id not in self._unfinished:  # nothing to generate: echo alone
                choice.finish_reason = FinishReason.LENGTH
                yield [Delta(choice, "", [])]
        while self._unfinished:
            deltas: dict[str, Delta] = {}
            for event in await self._mailbox.get():
                if event.request_id not in self._unfinished:  # it ended at a stop string while this event was under way
                    continue
                choice = self._unfinished[event.request_id]
                if event.finish_reason is FinishReason.ERROR:
                    raise failure(event)
                delta = choice.accept(event)
                earlier = deltas.setdefault(event.request_id, delta)
                if earlier is not delta:
                    earlier.text += delta.text
                    earlier.token_ids = earlier.token_ids + delta.token_ids
                    earlier.logprobs = earlier.logprobs + delta.logprobs
                if choice.finish_reason is not None:
                    del self._unfinished[choice.request_id]
                    if event.finish_reason is None:
                        choice.end_now()
                        self._engine.abort(choice.request_id, AbortReason.STOP_STRING)
            if deltas:
                yield list(deltas.values())

    def close(self) -> None:
        """Abort whatever still runs: the client has gone, or another choice failed."""
        self._abort_all()
        self._unfinished = {}

    def _abort_all(self) -> None:
        for request_id in self._unfinished:
            self._engine.abort(request_id, AbortReason.CLIENT)

    def generated(self) -> Generated:
        """For the record of the HTTP request."""
        usage, sampling = self.usage(), self.job.sampling
        operation = "text_completion" if self.id.startswith("cmpl") else "chat"
        parameters: dict[str, float | int | str] = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "choice.count": self.job.num_choices,
        }
        reasons = (choice.finish_reason for choice in self.choices)
        return Generated(
            operation,
            self.id,
            self.job.model,
            parameters,
            usage.prompt_tokens,
            usage.completion_tokens,
            tuple("abort" if reason is None else reason.value for reason in reasons),
            tuple(choice.timings for choice in self.choices if choice.timings is not None),
        )

    def usage(self) -> Usage:
        """Prompt tokens count once per prompt, delivered tokens once per choice."""
        firsts = self.choices[:: self.job.num_choices]
        num_prompt_tokens = sum(len(choice.prompt.token_ids) for choice in firsts)
        num_completion_tokens = sum(choice.num_tokens for choice in self.choices)
        num_cached_tokens = sum(choice.num_cached_tokens for choice in firsts)
        return Usage(
            num_prompt_tokens,
            num_completion_tokens,
            num_prompt_tokens + num_completion_tokens,
            PromptTokensDetails(num_cached_tokens),
        )

    def metrics(self) -> RequestMetrics:
        """Of the choices that have a token."""
        timings = [choice.timings for choice in self.choices if choice.timings is not None]
        firsts = [times.first_token for times in timings if times.first_token is not None]
        scheduled = [times.first_scheduled for times in timings if times.first_scheduled is not None]
        if not firsts or not scheduled:
            return RequestMetrics()
        generating = max(times.finished for times in timings) - min(firsts)
        between = sum(times.finished - times.first_token for times in timings if times.first_token is not None)
        num_later = sum(max(choice.num_tokens - 1, 0) for choice in self.choices)
        return RequestMetrics(
            queue_time_ms=_milliseconds(min(scheduled) - timings[0].arrival),
            time_to_first_token_ms=_milliseconds(min(firsts) - timings[0].arrival),
            generation_time_ms=_milliseconds(generating),
            mean_itl_ms=_milliseconds(between / num_later) if num_later else None,
            tokens_per_second=round(num_later / generating, 3) if num_later and generating > 0 else None,
            num_preemptions=sum(times.num_preemptions for times in timings),
        )


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def failure(event: TokenEvent) -> RequestError:
    message = event.error or "the engine failed"
    if event.is_request_fault:
        return RequestError(message)
    return RequestError(message, status=500, code="engine_error")
