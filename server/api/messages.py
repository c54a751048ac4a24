"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's shape of a chat."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from server.api.answer import AnswerReader
from server.api.blocks import Block, BlockChange, Blocks
from server.api.body import read_body
from server.api.chat_options import tool_choice
from server.api.chat_prompt import render_prompt
from server.api.context import ApiContext
from server.api.errors import RequestError, from_validation_error, messages_error_body, unavailable
from server.api.generation import Generation
from server.api.messages_schemas import CountTokensRequest, MessagesRequest, chat_fields
from server.api.parse import parse_chat
from server.api.prompts import refuse_huge_text
from server.api.responses import json_response, sse_event
from server.api.schemas import ChatRequest
from server.api.sse import EventStream, unless_disconnected
from server.engine.client import EngineUnavailable
from server.types import FinishReason


async def create_message(request: Request, context: ApiContext) -> Response:
    try:
        body = await read_body(request, MessagesRequest, context.max_request_bytes)
        job = await parse_chat(_chat_request(body), context)
        generation = Generation(job, context, "msg")
    except RequestError as error:
        return _error_response(error)
    try:
        generation.start()
        if job.stream:
            return EventStream(_events(generation), generation.close)
        return json_response(await unless_disconnected(request.receive, _whole(generation)))
    except RequestError as error:
        return _error_response(error)
    except EngineUnavailable as error:
        return _error_response(unavailable(str(error)))
    finally:
        if not job.stream:
            generation.close()


async def count_tokens(request: Request, context: ApiContext) -> Response:
    """How many tokens the prompt of a message would have."""
    try:
        body = await read_body(request, CountTokensRequest, context.max_request_bytes)
        chat = _chat_request(body)
        context.model_name(chat.model)
        text = render_prompt(chat, context, tool_choice(chat, context).offered)
        refuse_huge_text(text, "messages")
        [token_ids] = await context.tokenizer.encode_all([text], add_special_tokens=False)
    except RequestError as error:
        return _error_response(error)
    return json_response({"input_tokens": len(token_ids)})


def _chat_request(body: CountTokensRequest) -> ChatRequest:
    try:
        return ChatRequest.model_validate(chat_fields(body))
    except ValidationError as error:
        raise from_validation_error(error) from None


def _error_response(error: RequestError) -> Response:
    response = json_response(messages_error_body(error), error.status)
    response.headers.update(error.headers or {})
    return response


async def _whole(generation: Generation) -> dict[str, Any]:
    text = ""
    async for deltas in generation.deltas():
        text += "".join(delta.text for delta in deltas)
    reader, blocks = AnswerReader(generation.job.answer), Blocks()
    blocks.add(reader.feed(text, is_last=True))
    return _message(generation) | {
        "content": [_written(block, generation) for block in blocks.blocks],
        **_ending(generation, reader),
        "usage": _usage(generation),
    }


async def _events(generation: Generation) -> AsyncIterator[bytes]:
    reader, blocks = AnswerReader(generation.job.answer), Blocks()
    choice = generation.choices[0]
    try:
        yield _event("message_start", {"message": _message(generation)})
        async for deltas in generation.deltas():
            for delta in deltas:
                is_last = choice.finish_reason is not None
                changes = blocks.add(reader.feed(delta.text, is_last))
                if is_last:
                    changes += blocks.finish()
                if changes:
                    yield b"".join(_change_event(change) for change in changes)
        ending = {"delta": _ending(generation, reader), "usage": _usage(generation)}
        yield _event("message_delta", ending) + _event("message_stop", {})
    except RequestError as error:
        yield b"event: error\n" + sse_event(messages_error_body(error))


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return f"event: {kind}\n".encode() + sse_event({"type": kind} | fields)


def _change_event(change: BlockChange) -> bytes:
    block = change.block
    index = {"index": block.index}
    if change.change == "start":
        empty = {
            "text": {"type": "text", "text": ""},
            "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
            "call": {"type": "tool_use", "id": f"toolu_{block.id}", "name": block.name, "input": {}},
        }[block.kind]
        return _event("content_block_start", index | {"content_block": empty})
    if change.change == "stop":
        return _event("content_block_stop", index)
    kind, field = {
        "text": ("text_delta", "text"),
        "reasoning": ("thinking_delta", "thinking"),
        "call": ("input_json_delta", "partial_json"),
    }[block.kind]
    return _event("content_block_delta", index | {"delta": {"type": kind, field: change.text}})


def _message(generation: Generation) -> dict[str, Any]:
    return {
        "id": generation.id,
        "type": "message",
        "role": "assistant",
        "model": generation.job.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(generation),
    }


def _written(block: Block, generation: Generation) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    try:
        arguments = json.loads(block.text)
    except ValueError:  # cut short by max_tokens, or the model's own mistake: never by a grammar's doing
        arguments = None
    if not isinstance(arguments, dict):
        arguments = {"_unparsed": block.text}
    return {"type": "tool_use", "id": f"toolu_{block.id}", "name": block.name, "input": arguments}


def _ending(generation: Generation, reader: AnswerReader) -> dict[str, Any]:
    choice = generation.choices[0]
    if choice.finish_reason is FinishReason.STOP:
        if isinstance(choice.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
        return {"stop_reason": "tool_use" if reader.num_calls else "end_turn", "stop_sequence": None}
    if (
        choice.finish_reason is FinishReason.TIMEOUT
    ):  # the request's own; sent back as the last message, it is gone on from
        return {"stop_reason": "pause_turn", "stop_sequence": None}
    if choice.finish_reason is not FinishReason.LENGTH:
        raise RequestError("the server ended this request before its answer was complete", status=503)
    return {"stop_reason": "max_tokens", "stop_sequence": None}


def _usage(generation: Generation) -> dict[str, int]:
    """Anthropic counts cached prompt tokens apart from the others."""
    usage = generation.usage()
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
