"""The answers that handlers write as plain objects, for the OpenAPI document. Tests hold every answer against these."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct


class _Answer(Struct, forbid_unknown_fields=True, kw_only=True):
    """Nothing else is in it."""


class ErrorDetail(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    error: ErrorDetail


# Operations.


class Status(_Answer):
    status: Literal["ok"]


class Version(_Answer):
    version: str


class Model(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    vocab_size: int


class ModelList(_Answer):
    object: Literal["list"]
    data: list[Model]


class Tokens(_Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Answer):
    prompt: str


# /v1/responses.

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(_Answer, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ReasoningText(_Answer, tag_field="type", tag="reasoning_text"):
    text: str


class MessageItem(_Answer, tag_field="type", tag="message"):
    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCallItem(_Answer, tag_field="type", tag="function_call"):
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class ReasoningItem(_Answer, tag_field="type", tag="reasoning"):
    id: str
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]


Item = MessageItem | FunctionCallItem | ReasoningItem


class IncompleteDetails(_Answer):
    reason: str


class ResponseError(_Answer):
    code: str
    message: str


class InputTokensDetails(_Answer):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(_Answer):
    reasoning_tokens: int


class ResponseUsage(_Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseAnswer(_Answer):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    temperature: float
    top_p: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    truncation: Literal["disabled"]
    metadata: dict[str, str]
    user: str | None
    usage: ResponseUsage | None


class _Event(_Answer, tag_field="type"):
    sequence_number: int


class ResponseCreated(_Event, tag="response.created"):
    response: ResponseAnswer


class ResponseInProgress(_Event, tag="response.in_progress"):
    response: ResponseAnswer


class ResponseCompleted(_Event, tag="response.completed"):
    response: ResponseAnswer


class ResponseIncomplete(_Event, tag="response.incomplete"):
    response: ResponseAnswer


class ResponseFailed(_Event, tag="response.failed"):
    response: ResponseAnswer


class OutputItemAdded(_Event, tag="response.output_item.added"):
    output_index: int
    item: Item


class OutputItemDone(_Event, tag="response.output_item.done"):
    output_index: int
    item: Item


class _ItemEvent(_Event):
    output_index: int
    item_id: str


class _ContentEvent(_ItemEvent):
    content_index: int


class ContentPartAdded(_ContentEvent, tag="response.content_part.added"):
    part: OutputText


class ContentPartDone(_ContentEvent, tag="response.content_part.done"):
    part: OutputText


class OutputTextDelta(_ContentEvent, tag="response.output_text.delta"):
    delta: str
    logprobs: list[Any]


class OutputTextDone(_ContentEvent, tag="response.output_text.done"):
    text: str
    logprobs: list[Any]


class ReasoningTextDelta(_ContentEvent, tag="response.reasoning_text.delta"):
    delta: str


class ReasoningTextDone(_ContentEvent, tag="response.reasoning_text.done"):
    text: str


class ArgumentsDelta(_ItemEvent, tag="response.function_call_arguments.delta"):
    delta: str


class ArgumentsDone(_ItemEvent, tag="response.function_call_arguments.done"):
    name: str
    arguments: str


ResponseEvent = (
    ResponseCreated
    | ResponseInProgress
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
    | OutputItemAdded
    | OutputItemDone
    | ContentPartAdded
    | ContentPartDone
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | ArgumentsDelta
    | ArgumentsDone
)

# /v1/messages.


class TextBlock(_Answer, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(_Answer, tag_field="type", tag="thinking"):
    thinking: str
    signature: str


class ToolUseBlock(_Answer, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn"]


class MessageUsage(_Answer):
    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class MessageAnswer(_Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageErrorDetail(_Answer):
    type: str
    message: str


class MessageError(_Answer, tag_field="type", tag="error"):
    error: MessageErrorDetail


class InputTokens(_Answer):
    input_tokens: int


class TextDelta(_Answer, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(_Answer, tag_field="type", tag="thinking_delta"):
    thinking: str


class InputJsonDelta(_Answer, tag_field="type", tag="input_json_delta"):
    partial_json: str


class Ending(_Answer):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageStart(_Answer, tag_field="type", tag="message_start"):
    message: MessageAnswer


class ContentBlockStart(_Answer, tag_field="type", tag="content_block_start"):
    index: int
    content_block: ContentBlock


class ContentBlockDelta(_Answer, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | InputJsonDelta


class ContentBlockStop(_Answer, tag_field="type", tag="content_block_stop"):
    index: int


class MessageDelta(_Answer, tag_field="type", tag="message_delta"):
    delta: Ending
    usage: MessageUsage


class MessageStop(_Answer, tag_field="type", tag="message_stop"):
    pass


MessageEvent = (
    MessageStart | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDelta | MessageStop | MessageError
)
