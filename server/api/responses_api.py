"""POST /v1/responses: OpenAI's newer shape of a chat, without state."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from server.api.answer import AnswerReader
from server.api.blocks import Block, BlockChange, Blocks
from server.api.body import read_body
from server.api.context import ApiContext
from server.api.errors import RequestError, from_validation_error
from server.api.generation import Generation
from server.api.parse import parse_chat
from server.api.responses import json_response, sse_event
from server.api.responses_schemas import ResponsesRequest, chat_fields
from server.api.schemas import ChatRequest
from server.api.sse import EventStream, unless_disconnected
from server.types import FinishReason


async def create_response(request: Request, context: ApiContext) -> Response:
    body = await read_body(request, ResponsesRequest, context.max_request_bytes)
    try:
        chat = ChatRequest.model_validate(chat_fields(body))
    except ValidationError as error:
        raise from_validation_error(error) from None
    job = await parse_chat(chat, context)
    generation = Generation(job, context, "resp")
    try:
        generation.start()
        if job.stream:
            return EventStream(_events(generation, body), generation.close)
        return json_response(await unless_disconnected(request.receive, _whole(generation, body)))
    finally:
        if not job.stream:
            generation.close()


async def _whole(generation: Generation, body: ResponsesRequest) -> dict[str, Any]:
    text = ""
    async for deltas in generation.deltas():
        text += "".join(delta.text for delta in deltas)
    blocks = Blocks()
    blocks.add(AnswerReader(generation.job.answer).feed(text, is_last=True))
    return _response(generation, body, blocks)


async def _events(generation: Generation, body: ResponsesRequest) -> AsyncIterator[bytes]:
    reader, blocks = AnswerReader(generation.job.answer), Blocks()
    choice, numbers = generation.choices[0], itertools.count()

    def event(kind: str, fields: dict[str, Any]) -> bytes:
        numbered = {"type": kind, "sequence_number": next(numbers)} | fields
        return f"event: {kind}\n".encode() + sse_event(numbered)

    try:
        for kind in ("response.created", "response.in_progress"):
            yield event(kind, {"response": _response(generation, body, blocks)})
        async for deltas in generation.deltas():
            for delta in deltas:
                is_last = choice.finish_reason is not None
                changes = blocks.add(reader.feed(delta.text, is_last))
                if is_last:
                    changes += blocks.finish()
                told = [event(kind, fields) for change in changes for kind, fields in _told(change, blocks, generation)]
                if told:
                    yield b"".join(told)
        response = _response(generation, body, blocks)
        yield event(f"response.{response['status']}", {"response": response})
    except RequestError as error:
        failed = {"code": "server_error", "message": error.message}
        response = _response(generation, body, blocks) | {"status": "failed", "error": failed}
        yield event("response.failed", {"response": response})


def _told(change: BlockChange, blocks: Blocks, generation: Generation) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of one change: an item's, and those of the part within it."""
    block = change.block
    item = {"output_index": block.index}
    part = item | {"item_id": _item_id(block), "content_index": 0}
    if change.change == "start":
        empty = Block(block.index, block.kind, block.name, "", block.id)
        yield "response.output_item.added", item | {"item": _item(empty, "in_progress", has_content=False)}
        if block.kind == "text":
            yield "response.content_part.added", part | {"part": _text_part("")}
    elif change.change == "delta":
        kind = {
            "text": "response.output_text.delta",
            "reasoning": "response.reasoning_text.delta",
            "call": "response.function_call_arguments.delta",
        }[block.kind]
        fields = part | {"delta": change.text}
        if block.kind == "call":
            del fields["content_index"]
        yield kind, fields | ({"logprobs": []} if block.kind == "text" else {})
    else:
        if block.kind == "text":
            yield "response.output_text.done", part | {"text": block.text, "logprobs": []}
            yield "response.content_part.done", part | {"part": _text_part(block.text)}
        elif block.kind == "reasoning":
            yield "response.reasoning_text.done", part | {"text": block.text}
        else:
            done = item | {"item_id": _item_id(block), "name": block.name, "arguments": block.text}
            yield "response.function_call_arguments.done", done
        yield "response.output_item.done", item | {"item": _item(block, _item_status(block, blocks, generation))}


def _item_status(block: Block, blocks: Blocks, generation: Generation) -> str:
    """An answer that is cut is cut in its last item; those before it had ended."""
    is_cut = generation.choices[0].finish_reason not in (None, FinishReason.STOP)
    return "incomplete" if is_cut and block is blocks.blocks[-1] else "completed"


def _item_id(block: Block) -> str:
    return {"text": "msg_", "reasoning": "rs_", "call": "fc_"}[block.kind] + block.id


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(block: Block, status: str, has_content: bool = True) -> dict[str, Any]:
    common = {"id": _item_id(block), "status": status}
    if block.kind == "call":
        call = {"call_id": f"call_{block.id}", "name": block.name, "arguments": block.text}
        return {"type": "function_call"} | common | call
    if block.kind == "reasoning":
        content = [{"type": "reasoning_text", "text": block.text}] if has_content else []
        return {"type": "reasoning", "summary": [], "content": content} | common
    content = [_text_part(block.text)] if has_content else []
    return {"type": "message", "role": "assistant", "content": content} | common


def _num_reasoning_tokens(generation: Generation, blocks: Blocks) -> int:
    """As the tokenizer divides the text: what the model produced for the same text may differ by a token at its ends."""
    text = "".join(block.text for block in blocks.blocks if block.kind == "reasoning")
    return len(generation.tokenizer.encode(text, add_special_tokens=False)) if text else 0


def _response(generation: Generation, body: ResponsesRequest, blocks: Blocks) -> dict[str, Any]:
    """The response as it is now."""
    choice, sampling = generation.choices[0], generation.job.sampling
    reason = choice.finish_reason
    status = "in_progress" if reason is None else "completed" if reason is FinishReason.STOP else "incomplete"
    details = None
    if status == "incomplete":
        details = {"reason": "max_output_tokens" if reason is FinishReason.LENGTH else reason}
    usage = generation.usage()
    sent = body.model_dump(mode="json", by_alias=True, exclude_none=True, include={"text", "tool_choice", "tools"})
    return {
        "id": generation.id,
        "object": "response",
        "created_at": generation.created,
        "status": status,
        "error": None,
        "incomplete_details": details,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": generation.job.model,
        "output": []
        if reason is None
        else [_item(block, _item_status(block, blocks, generation)) for block in blocks.blocks],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "text": sent.get("text", {"format": {"type": "text"}}),
        "tool_choice": sent.get("tool_choice", "auto"),
        "tools": sent.get("tools", []),
        "truncation": "disabled",
        "metadata": body.metadata or {},
        "user": body.user,
        "usage": None
        if reason is None
        else {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "cache_write_tokens": 0,  # writing costs nothing of its own
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": _num_reasoning_tokens(generation, blocks)},
            "total_tokens": usage.total_tokens,
        },
    }
