"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from server.api.context import ApiContext
from server.api.errors import RequestError, error_body
from server.api.generation import Delta, Generation
from server.api.parse import parse_chat, read_body
from server.api.responses import (
    SSE_DONE,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    Usage,
    json_response,
    sse_event,
)
from server.api.schemas import ChatRequest
from server.api.sse import EventStream, unless_disconnected


async def create_chat_completion(request: Request, context: ApiContext) -> Response:
    body = await read_body(request, ChatRequest, context.max_request_bytes)
    job = await parse_chat(body, context)
    generation = Generation(job, context, "chatcmpl")
    try:
        generation.start()
        if job.stream:
            return EventStream(_events(generation), generation.close)
        return json_response(await unless_disconnected(request.receive, _whole(generation)))
    finally:
        if not job.stream:
            generation.close()


async def _whole(generation: Generation) -> ChatCompletion:
    texts: dict[int, list[str]] = {choice.index: [] for choice in generation.choices}
    token_ids: dict[int, list[int]] = {choice.index: [] for choice in generation.choices}
    async for deltas in generation.deltas():
        for delta in deltas:
            texts[delta.choice.index].append(delta.text)
            token_ids[delta.choice.index] += delta.token_ids
    with_ids = generation.job.return_token_ids
    choices = [
        ChatChoice(
            index=choice.index,
            message=AssistantMessage(content="".join(texts[choice.index])),
            finish_reason=None if choice.finish_reason is None else choice.finish_reason.value,
            stop_reason=choice.stop_reason,
            token_ids=token_ids[choice.index] if with_ids else UNSET,
        )
        for choice in generation.choices
    ]
    return ChatCompletion(
        id=generation.id,
        created=generation.created,
        model=generation.job.model,
        choices=choices,
        usage=generation.usage(),
        prompt_token_ids=generation.job.prompts[0].token_ids if with_ids else UNSET,
    )


async def _events(generation: Generation) -> AsyncIterator[bytes]:
    job = generation.job
    no_usage = None if job.include_usage else UNSET
    try:
        yield b"".join(
            sse_event(_role_chunk(generation, choice.index, is_first=choice.index == 0))
            for choice in generation.choices
        )
        async for deltas in generation.deltas():
            chunks = []
            for delta in deltas:
                usage = generation.usage() if job.continuous_usage else no_usage
                chunks.append(sse_event(_chunk(generation, [_chunk_choice(job.return_token_ids, delta)], usage)))
            yield b"".join(chunks)
        if job.include_usage:
            yield sse_event(_chunk(generation, [], generation.usage()))
    except RequestError as error:
        yield sse_event(error_body(error.message, error.status, error.param, error.code))
    yield SSE_DONE


def _role_chunk(generation: Generation, index: int, is_first: bool) -> ChatChunk:
    """A choice's first chunk, sent before there is any token."""
    chunk = _chunk(
        generation,
        [ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))],
        None if generation.job.include_usage else UNSET,
    )
    if is_first and generation.job.return_token_ids:
        chunk.prompt_token_ids = generation.job.prompts[0].token_ids
    return chunk


def _chunk_choice(with_ids: bool, delta: Delta) -> ChatChunkChoice:
    choice = delta.choice
    return ChatChunkChoice(
        index=choice.index,
        delta=ChatDelta(content=delta.text),
        finish_reason=None if choice.finish_reason is None else choice.finish_reason.value,
        stop_reason=choice.stop_reason,
        token_ids=delta.token_ids if with_ids else UNSET,
    )


def _chunk(generation: Generation, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
    return ChatChunk(
        id=generation.id, created=generation.created, model=generation.job.model, choices=choices, usage=usage
    )
