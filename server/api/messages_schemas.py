"""Bodies of POST /v1/messages, and what they come to as a chat."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from server.api.errors import RequestError
from server.api.schemas import MAX_STOP_STRINGS, MAX_TOOLS, Integer, OnlyNull, Schema, StopString, Timeout, ToolName


class CacheControl(Schema):
    """Accepted for compatibility: prefixes are cached always."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Schema):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: OnlyNull = None


class ThinkingBlock(Schema):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Schema):
    type: Literal["tool_use"]
    id: str
    name: ToolName
    input: dict[str, Any]
    cache_control: CacheControl | None = None


Texts = Annotated[
    Annotated[str, Tag("@text")] | Annotated[list[TextBlock], Field(fail_fast=True), Tag("@blocks")],
    Discriminator(
        lambda value: "@text" if isinstance(value, str) else "@blocks" if isinstance(value, list) else None,
        custom_error_type="wrong_type",
        custom_error_message="must be a string or a list of text blocks",
    ),
]


class ToolResultBlock(Schema):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = Field(None, description="The model reads the content as an error.")
    cache_control: CacheControl | None = None


ContentBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class MessageItem(Schema):
    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("@text")] | Annotated[list[ContentBlock], Field(fail_fast=True), Tag("@blocks")],
        Discriminator(
            lambda value: "@text" if isinstance(value, str) else "@blocks" if isinstance(value, list) else None,
            custom_error_type="wrong_type",
            custom_error_message="must be a string or a list of content blocks",
        ),
    ]


class ToolDefinition(Schema):
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(None, description="Input of calls that must be made follows the schema always.")
    cache_control: CacheControl | None = None


class ToolChoiceField(Schema):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(Schema):
    user_id: str | None = None


class Thinking(Schema):
    """Models that reason decide by themselves; "disabled" leaves their reasoning out of the answer."""

    type: Literal["disabled", "adaptive"]


class CountTokensRequest(Schema):
    model: str
    messages: list[MessageItem] = Field(fail_fast=True, min_length=1)
    system: Texts | None = None
    tools: Annotated[list[ToolDefinition], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceField | None = None
    thinking: Thinking | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: Integer = Field(ge=1, le=2**31 - 1)
    stop_sequences: Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=0, le=2**31 - 1)
    metadata: Metadata | None = Field(None, description="Accepted for compatibility.")
    service_tier: Literal["auto", "standard_only"] | None = Field(None, description="There is one.")
    timeout: Timeout | None = Field(
        None, description="Seconds, after which the message ends as it is, with stop_reason pause_turn."
    )


def chat_fields(body: CountTokensRequest) -> dict[str, Any]:
    """The body of a chat request that asks the same. A last message of the assistant's is gone on from.

    Raises RequestError for a choice of tools that says too much or too little.
    """
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system)})
    for item in body.messages:
        messages += _messages(item)
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "include_reasoning": body.thinking is None or body.thinking.type != "disabled",
    }
    if body.messages[-1].role == "assistant":
        fields["continue_final_message"] = True
    if body.tools:
        fields["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                },
            }
            for tool in body.tools
        ]
    choice = body.tool_choice
    if choice is not None:
        if (choice.name is not None) != (choice.type == "tool"):
            raise RequestError('tool_choice.name: goes with type "tool", and only with that', param="tool_choice.name")
        named = {"type": "function", "function": {"name": choice.name}}
        fields["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "stream": body.stream,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "timeout": body.timeout,
        }
    return fields


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content or [])


def _messages(item: MessageItem) -> list[dict[str, Any]]:
    """Tool results are messages of their own, before the text that comes with them."""
    if isinstance(item.content, str):
        return [{"role": item.role, "content": item.content}]
    text = "".join(block.text for block in item.content if isinstance(block, TextBlock))
    results = [
        {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": ("Error: " if block.is_error else "") + _text(block.content),
        }
        for block in item.content
        if isinstance(block, ToolResultBlock)
    ]
    message: dict[str, Any] = {"role": item.role, "content": text}
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
        for block in item.content
        if isinstance(block, ToolUseBlock)
    ]
    if calls:
        message["tool_calls"] = calls
    thoughts = "".join(block.thinking for block in item.content if isinstance(block, ThinkingBlock))
    if thoughts:
        message["reasoning_content"] = thoughts
    return [*results, message] if text or calls or thoughts or not results else results
