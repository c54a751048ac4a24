"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from server.api.context import ApiContext
from server.api.errors import RequestError, error_body
from server.api.generation import Delta, Generation
from server.api.logprobs import chat_logprobs, prompt_logprobs
from server.api.parse import parse_chat, read_body
from server.api.responses import (
    SSE_DONE,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
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
    job = generation.job
    gathered = {choice.index: Delta(choice, "", []) for choice in generation.choices}
    async for deltas in generation.deltas():
        for delta in deltas:
            whole = gathered[delta.choice.index]
            whole.text += delta.text
            whole.token_ids += delta.token_ids
            whole.logprobs += delta.logprobs
    answer = ChatCompletion(
        id=generation.id,
        created=generation.created,
        model=job.model,
        choices=[_choice(generation, whole) for whole in gathered.values()],
        usage=generation.usage(),
    )
    prompt = job.prompts[0].token_ids
    if job.return_token_ids:
        answer.prompt_token_ids = prompt
    if job.num_prompt_logprobs is not None:
        entries = generation.choices[0].prompt_logprobs
        answer.prompt_logprobs = prompt_logprobs(generation.tokenizer, job.num_prompt_logprobs, prompt, entries)
    return answer


def _choice(generation: Generation, whole: Delta) -> ChatChoice:
    choice = whole.choice
    return ChatChoice(
        index=choice.index,
        message=AssistantMessage(content=whole.text),
        logprobs=_logprobs(generation, whole),
        finish_reason=None if choice.finish_reason is None else choice.finish_reason.value,
        stop_reason=choice.stop_reason,
        token_ids=whole.token_ids if generation.job.return_token_ids else UNSET,
    )


def _logprobs(generation: Generation, delta: Delta) -> ChatLogprobs | None:
    num_top = generation.job.sampling.num_logprobs
    if num_top is None:
        return None
    return chat_logprobs(generation.tokenizer, num_top, delta.token_ids, delta.logprobs)


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
                chunks.append(sse_event(_chunk(generation, [_chunk_choice(generation, delta)], usage)))
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


def _chunk_choice(generation: Generation, delta: Delta) -> ChatChunkChoice:
    choice = delta.choice
    return ChatChunkChoice(
        index=choice.index,
        delta=ChatDelta(content=delta.text),
        logprobs=_logprobs(generation, delta),
        finish_reason=None if choice.finish_reason is None else choice.finish_reason.value,
        stop_reason=choice.stop_reason,
        token_ids=delta.token_ids if generation.job.return_token_ids else UNSET,
    )


def _chunk(generation: Generation, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
    return ChatChunk(
        id=generation.id, created=generation.created, model=generation.job.model, choices=choices, usage=usage
    )
