"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from server.api.answer import AnswerReader
from server.api.body import read_body
from server.api.call_scanner import CallArguments, CallStart
from server.api.context import ApiContext
from server.api.errors import RequestError, error_body
from server.api.generation import Choice, Delta, Generation
from server.api.logprobs import chat_logprobs, prompt_logprobs
from server.api.parse import parse_chat
from server.api.responses import (
    SSE_DONE,
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
    json_response,
    sse_event,
)
from server.api.schemas import ChatRequest
from server.api.sse import EventStream, unless_disconnected
from server.types import FinishReason


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
    if job.include_metrics:
        answer.metrics = generation.metrics()
    prompt = job.prompts[0].token_ids
    if job.return_token_ids:
        answer.prompt_token_ids = prompt
    if job.num_prompt_logprobs is not None:
        answer.prompt_logprobs = prompt_logprobs(generation.tokenizer, job.num_prompt_logprobs, generation.choices[0])
    return answer


def _choice(generation: Generation, whole: Delta) -> ChatChoice:
    choice, reader = whole.choice, AnswerReader(generation.job.answer)
    piece = reader.feed(whole.text, is_last=True)
    calls: list[ToolCall] = []
    for event in piece.calls:
        if isinstance(event, CallStart):
            calls.append(ToolCall(id=_call_id(), function=CalledFunction(event.name, "")))
        else:
            calls[event.index].function.arguments += event.text
    return ChatChoice(
        index=choice.index,
        message=AssistantMessage(
            content=None if calls and not piece.content else piece.content,
            reasoning_content=piece.reasoning or UNSET,
            tool_calls=calls or UNSET,
        ),
        logprobs=_logprobs(generation, whole),
        finish_reason=_finish_reason(generation, choice, reader),
        stop_reason=choice.stop_reason,
        token_ids=whole.token_ids if generation.job.return_token_ids else UNSET,
    )


def _finish_reason(generation: Generation, choice: Choice, reader: AnswerReader) -> str | None:
    """As OpenAI has it: a call that the request named ends with stop."""
    reason = choice.finish_reason
    if reason is FinishReason.STOP and reader.num_calls and generation.job.answer.tools != "named":
        return "tool_calls"
    return None if reason is None else reason.value


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _logprobs(generation: Generation, delta: Delta) -> ChatLogprobs | None:
    num_top = generation.job.sampling.num_logprobs
    if num_top is None:
        return None
    return chat_logprobs(generation.tokenizer, num_top, delta.token_ids, delta.logprobs)


async def _events(generation: Generation) -> AsyncIterator[bytes]:
    job = generation.job
    readers = {choice.index: AnswerReader(job.answer) for choice in generation.choices}
    try:
        yield b"".join(
            sse_event(_role_chunk(generation, choice.index, is_first=choice.index == 0))
            for choice in generation.choices
        )
        async for deltas in generation.deltas():
            chunks = []
            for delta in deltas:
                chunk_choice = _chunk_choice(generation, delta, readers[delta.choice.index])
                if chunk_choice is not None:
                    chunks.append(sse_event(_chunk(generation, [chunk_choice], _chunk_usage(generation))))
            if chunks:
                yield b"".join(chunks)
        if job.include_usage or job.include_metrics:
            last = _chunk(generation, [], generation.usage() if job.include_usage else UNSET)
            if job.include_metrics:
                last.metrics = generation.metrics()
            yield sse_event(last)
    except RequestError as error:
        yield sse_event(error_body(error.message, error.status, error.param, error.code))
    yield SSE_DONE


def _chunk_usage(generation: Generation) -> Usage | UnsetType | None:
    """Of a chunk with choices: null where a last one will have it."""
    if generation.job.continuous_usage:
        return generation.usage()
    return None if generation.job.include_usage else UNSET


def _role_chunk(generation: Generation, index: int, is_first: bool) -> ChatChunk:
    """A choice's first chunk, sent before there is any token."""
    chunk = _chunk(
        generation,
        [ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))],
        _chunk_usage(generation),
    )
    if is_first and generation.job.return_token_ids:
        chunk.prompt_token_ids = generation.job.prompts[0].token_ids
    return chunk


def _chunk_choice(generation: Generation, delta: Delta, reader: AnswerReader) -> ChatChunkChoice | None:
    """None where these tokens have nothing to show yet."""
    choice, job = delta.choice, generation.job
    piece = reader.feed(delta.text, is_last=choice.finish_reason is not None)
    made = ChatDelta(reasoning_content=piece.reasoning or UNSET)
    if piece.content or not (piece.reasoning or piece.calls or job.answer.tools in ("named", "required")):
        made.content = piece.content
    if piece.calls:
        made.tool_calls = [_call_delta(event) for event in piece.calls]
    is_empty = not (piece.content or piece.reasoning or piece.calls)
    if is_empty and choice.finish_reason is None and not job.return_token_ids and job.sampling.num_logprobs is None:
        return None
    return ChatChunkChoice(
        index=choice.index,
        delta=made,
        logprobs=_logprobs(generation, delta),
        finish_reason=_finish_reason(generation, choice, reader),
        stop_reason=choice.stop_reason,
        token_ids=delta.token_ids if job.return_token_ids else UNSET,
    )


def _call_delta(event: CallStart | CallArguments) -> ToolCallDelta:
    if isinstance(event, CallStart):
        function = FunctionDelta(name=event.name, arguments="")
        return ToolCallDelta(index=event.index, id=_call_id(), type="function", function=function)
    return ToolCallDelta(index=event.index, function=FunctionDelta(arguments=event.text))


def _chunk(generation: Generation, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
    return ChatChunk(
        id=generation.id, created=generation.created, model=generation.job.model, choices=choices, usage=usage
    )
