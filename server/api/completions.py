"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from server.api.context import ApiContext
from server.api.errors import RequestError, error_body
from server.api.generation import Choice, Delta, Generation
from server.api.parse import parse_completion, read_body
from server.api.responses import SSE_DONE, Completion, CompletionChoice, Usage, json_response, sse_event
from server.api.schemas import CompletionRequest
from server.api.sse import EventStream, unless_disconnected


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
    texts: dict[int, list[str]] = {choice.index: [choice.prompt.echo_text] for choice in generation.choices}
    token_ids: dict[int, list[int]] = {choice.index: [] for choice in generation.choices}
    async for deltas in generation.deltas():
        for delta in deltas:
            texts[delta.choice.index].append(delta.text)
            token_ids[delta.choice.index] += delta.token_ids
    choices = [
        _choice(generation, choice, "".join(texts[choice.index]), token_ids[choice.index], is_first=True)
        for choice in generation.choices
    ]
    return _completion(generation, choices, generation.usage())


async def _events(generation: Generation) -> AsyncIterator[bytes]:
    job = generation.job
    begun: set[int] = set()  # choices that have sent a chunk
    no_usage = None if job.include_usage else UNSET
    try:
        async for deltas in generation.deltas():
            chunks = []
            for delta in deltas:
                chunk_choice = _chunk_choice(generation, delta, is_first=delta.choice.index not in begun)
                begun.add(delta.choice.index)
                usage = generation.usage() if job.continuous_usage else no_usage
                chunks.append(sse_event(_completion(generation, [chunk_choice], usage)))
            yield b"".join(chunks)
        if job.include_usage:
            yield sse_event(_completion(generation, [], generation.usage()))
    except RequestError as error:
        yield sse_event(error_body(error.message, error.status, error.param, error.code))
    yield SSE_DONE


def _chunk_choice(generation: Generation, delta: Delta, is_first: bool) -> CompletionChoice:
    text = delta.choice.prompt.echo_text + delta.text if is_first else delta.text
    return _choice(generation, delta.choice, text, delta.token_ids, is_first)


def _choice(
    generation: Generation, choice: Choice, text: str, token_ids: list[int], is_first: bool
) -> CompletionChoice:
    with_ids = generation.job.return_token_ids
    return CompletionChoice(
        index=choice.index,
        text=text,
        finish_reason=None if choice.finish_reason is None else choice.finish_reason.value,
        stop_reason=choice.stop_reason,
        token_ids=token_ids if with_ids else UNSET,
        prompt_token_ids=choice.prompt.token_ids if with_ids and is_first else UNSET,
    )


def _completion(generation: Generation, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
    return Completion(
        id=generation.id, created=generation.created, model=generation.job.model, choices=choices, usage=usage
    )
