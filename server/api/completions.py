"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import read_body
from server.api.context import ApiContext
from server.api.errors import RequestError, error_body
from server.api.generation import Delta, Generation
from server.api.logprobs import CompletionLogprobsWriter, prompt_logprobs
from server.api.parse import parse_completion
from server.api.responses import SSE_DONE, Completion, CompletionChoice, Usage, json_response, sse_event
from server.api.schemas import CompletionRequest
from server.api.sse import EventStream, unless_disconnected
from server.types import TokenLogprob


async def create_completion(request: Request, context: ApiContext) -> Response:
    body = await read_body(request, CompletionRequest, context.max_request_bytes)
    job = await parse_completion(body, context)
    generation = Generation(job, context, "cmpl")
    try:
        generation.start()
        if job.stream:
            return EventStream(_events(generation), generation.close)
        return json_response(await unless_disconnected(request.receive, _whole(generation)))
    finally:
        if not job.stream:
            generation.close()


async def _whole(generation: Generation) -> Completion:
    writer = _ChoiceWriter(generation)
    gathered = {choice.index: Delta(choice, "", []) for choice in generation.choices}
    async for deltas in generation.deltas():
        for delta in deltas:
            whole = gathered[delta.choice.index]
            whole.text += delta.text
            whole.token_ids += delta.token_ids
            whole.logprobs += delta.logprobs
    whole_answer = _completion(generation, [writer.write(delta) for delta in gathered.values()], generation.usage())
    if generation.job.include_metrics:
        whole_answer.metrics = generation.metrics()
    return whole_answer


async def _events(generation: Generation) -> AsyncIterator[bytes]:
    job = generation.job
    writer = _ChoiceWriter(generation)
    no_usage = None if job.include_usage else UNSET
    try:
        async for deltas in generation.deltas():
            chunks = []
            for delta in deltas:
                usage = generation.usage() if job.continuous_usage else no_usage
                chunks.append(sse_event(_completion(generation, [writer.write(delta)], usage)))
            yield b"".join(chunks)
        if job.include_usage or job.include_metrics:
            last = _completion(generation, [], generation.usage() if job.include_usage else UNSET)
            if job.include_metrics:
                last.metrics = generation.metrics()
            yield sse_event(last)
    except RequestError as error:
        yield sse_event(error_body(error.message, error.status, error.param, error.code))
    yield SSE_DONE


class _ChoiceWriter:
    """Deltas to the shape of the API. A choice's first brings what is told of its prompt."""

    def __init__(self, generation: Generation) -> None:
        self._job = generation.job
        self._tokenizer = generation.tokenizer
        self._begun: set[int] = set()
        num_logprobs = self._job.sampling.num_logprobs
        self._logprobs: dict[int, CompletionLogprobsWriter] = {}
        if num_logprobs is not None:
            hidden = self._tokenizer.special_token_ids if self._job.skip_special_tokens else frozenset()
            self._logprobs = {
                choice.index: CompletionLogprobsWriter(self._tokenizer, num_logprobs, hidden)
                for choice in generation.choices
            }

    def write(self, delta: Delta) -> CompletionChoice:
        choice, job = delta.choice, self._job
        is_first = choice.index not in self._begun
        self._begun.add(choice.index)
        written = CompletionChoice(
            index=choice.index,
            text=choice.prompt.echo_text + delta.text if is_first else delta.text,
            finish_reason=None if choice.finish_reason is None else choice.finish_reason.value,
            stop_reason=choice.stop_reason,
        )
        if job.return_token_ids:
            written.token_ids = delta.token_ids
            if is_first:
                written.prompt_token_ids = choice.prompt.token_ids
        if is_first and job.num_prompt_logprobs is not None:
            written.prompt_logprobs = prompt_logprobs(self._tokenizer, job.num_prompt_logprobs, choice)
        if self._logprobs:
            token_ids: list[int] = delta.token_ids
            entries: list[TokenLogprob | None] = [*delta.logprobs]
            if is_first and job.echo and choice.prompt_logprobs is not None:
                token_ids = choice.prompt.token_ids + token_ids
                entries = [None, *choice.prompt_logprobs, *entries]
            written.logprobs = self._logprobs[choice.index].write(token_ids, entries)
        return written


def _completion(generation: Generation, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
    return Completion(
        id=generation.id, created=generation.created, model=generation.job.model, choices=choices, usage=usage
    )
