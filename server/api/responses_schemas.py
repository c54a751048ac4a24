"""Bodies of POST /v1/responses, and what they come to as a chat. Stateless: nothing is stored, nothing can be referred to."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from server.api.errors import BRANCH_PREFIX
from server.api.schemas import (
    MAX_TOOLS,
    Integer,
    OnlyEmptyList,
    OnlyFalse,
    OnlyNull,
    OnlyZero,
    Schema,
    Timeout,
    ToolName,
)


class TextItem(Schema):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: OnlyEmptyList = None
    logprobs: OnlyEmptyList = None


ItemContent = Annotated[
    Annotated[str, Tag("@text")] | Annotated[list[TextItem], Field(fail_fast=True), Tag("@parts")],
    Discriminator(
        lambda value: "@text" if isinstance(value, str) else "@parts" if isinstance(value, list) else None,
        custom_error_type="wrong_type",
        custom_error_message="must be a string or a list of text parts",
    ),
]


class MessageInput(Schema):
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: ItemContent


class FunctionCallInput(Schema):
    type: Literal["function_call"]
    id: str | None = None
    status: str | None = None
    call_id: str
    name: ToolName
    arguments: str


class FunctionOutputInput(Schema):
    type: Literal["function_call_output"]
    id: str | None = None
    status: str | None = None
    call_id: str
    output: ItemContent


class ReasoningText(Schema):
    type: Literal["reasoning_text"]
    text: str


class ReasoningInput(Schema):
    """Sent back by clients that keep a conversation; goes to templates that show earlier reasoning."""

    type: Literal["reasoning"]
    id: str | None = None
    status: str | None = None
    summary: OnlyEmptyList = None
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    encrypted_content: OnlyNull = None


def _kind(value: Any) -> Any:
    return f"{BRANCH_PREFIX}{value.get('type', 'message')}" if isinstance(value, dict) else None


InputItem = Annotated[
    Annotated[MessageInput, Tag("@message")]
    | Annotated[FunctionCallInput, Tag("@function_call")]
    | Annotated[FunctionOutputInput, Tag("@function_call_output")]
    | Annotated[ReasoningInput, Tag("@reasoning")],
    Discriminator(
        _kind,
        custom_error_type="wrong_type",
        custom_error_message="must be a message, function_call, function_call_output or reasoning item",
    ),
]
ResponseInput = Annotated[
    Annotated[str, Tag("@text")] | Annotated[list[InputItem], Field(fail_fast=True, min_length=1), Tag("@items")],
    Discriminator(
        lambda value: "@text" if isinstance(value, str) else "@items" if isinstance(value, list) else None,
        custom_error_type="wrong_type",
        custom_error_message="must be a string or a list of items",
    ),
]


class FunctionTool(Schema):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Schema):
    type: Literal["function"]
    name: ToolName


class PlainText(Schema):
    type: Literal["text", "json_object"]


class SchemaText(Schema):
    type: Literal["json_schema"]
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Schema):
    format: Annotated[PlainText | SchemaText, Field(discriminator="type")] | None = None
    verbosity: OnlyNull = None


class ResponsesRequest(Schema):
    model: str | None = None
    input: ResponseInput
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: Integer | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("@word")] | Annotated[FunctionChoice, Tag("@function")],
            Discriminator(
                lambda value: "@word" if isinstance(value, str) else "@function" if isinstance(value, dict) else None,
                custom_error_type="wrong_type",
                custom_error_message='must be "none", "auto", "required" or {"type": "function", "name": ...}',
            ),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = Field(None, description="Returned as it came.")
    user: str | None = None
    safety_identifier: str | None = Field(None, description="Accepted for compatibility, as `user`.")
    prompt_cache_key: str | None = Field(None, description="Accepted for compatibility: prefixes are cached always.")
    timeout: Timeout | None = Field(
        None, description="Seconds, after which the response is incomplete as it is, by the reason timeout."
    )

    store: OnlyFalse = None
    background: OnlyFalse = None
    previous_response_id: OnlyNull = None
    conversation: OnlyNull = None
    prompt: OnlyNull = None
    include: OnlyEmptyList = None
    reasoning: OnlyNull = None
    max_tool_calls: OnlyNull = None
    top_logprobs: OnlyZero = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None


def chat_fields(body: ResponsesRequest) -> dict[str, Any]:
    """The body of a chat request that asks the same."""
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stream": body.stream,
        "parallel_tool_calls": body.parallel_tool_calls,
        "timeout": body.timeout,
    }
    if body.tools:
        fields["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in body.tools
        ]
    if isinstance(body.tool_choice, FunctionChoice):
        fields["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    else:
        fields["tool_choice"] = body.tool_choice
    form = None if body.text is None else body.text.format
    if isinstance(form, SchemaText):
        schema = {"name": form.name, "schema": form.json_schema, "strict": form.strict}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif form is not None:
        fields["response_format"] = {"type": form.type}
    return fields


def _text(content: str | list[TextItem]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Reasoning and calls in a row belong to one message of the assistant's, with the text before them."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    reasoning = ""
    for item in body.input:
        if isinstance(item, ReasoningInput):
            reasoning += "".join(part.text for part in item.content or [])
            continue
        if isinstance(item, FunctionOutputInput):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            continue
        if isinstance(item, MessageInput):
            message: dict[str, Any] = {"role": item.role, "content": _text(item.content)}
            messages.append(message)
        else:
            call = {
                "id": item.call_id,
                "type": "function",
                "function": {"name": item.name, "arguments": item.arguments},
            }
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            message = messages[-1]
            message.setdefault("tool_calls", []).append(call)
        if reasoning and message["role"] == "assistant":
            message["reasoning_content"] = reasoning
            reasoning = ""
    return messages
