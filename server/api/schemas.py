"""Request bodies. Strict: a field is honoured, or it is refused by name; values that change nothing are accepted.

Fields have OpenAI's names, and vLLM's for what OpenAI's API lacks.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from server.api.errors import BRANCH_PREFIX

MAX_PROMPTS = 1024
MAX_CHOICES_PER_PROMPT = 128
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_LOGPROBS = 20
MAX_CHOICES = 1024
MAX_TOOLS = 128


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _only(*values: Any) -> tuple[AfterValidator, WithJsonSchema]:
    """For fields that clients send although this server has no such feature: the values that ask for nothing."""
    shown = " or ".join(json.dumps(value) for value in values)

    def check(value: Any) -> Any:
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in values):
            raise PydanticCustomError("unsupported", "not supported; leave it out or send {shown}", {"shown": shown})
        return value

    return AfterValidator(check), WithJsonSchema({"enum": list(values), "description": "Not supported."})


OnlyNull = Annotated[Any, *_only(None)]
OnlyFalse = Annotated[Any, *_only(None, False)]
OnlyTrue = Annotated[Any, *_only(None, True)]
OnlyBool = Annotated[Any, *_only(None, True, False)]
OnlyZero = Annotated[Any, *_only(None, 0)]
OnlyOne = Annotated[Any, *_only(None, 1)]
OnlyEmptyString = Annotated[Any, *_only(None, "")]
OnlyEmptyList = Annotated[Any, *_only(None, [])]
OnlyEmptyObject = Annotated[Any, *_only(None, {})]


def _branch(value: Any) -> str | None:
    """Which branch of a union a JSON value is for; its first element decides for a list."""
    if isinstance(value, str):
        return BRANCH_PREFIX + "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    if isinstance(first, bool):
        return None
    kinds = {str: "texts", int: "ids", list: "id lists", dict: "parts"}
    kind = next((name for kind, name in kinds.items() if isinstance(first, kind)), None)
    return None if kind is None else BRANCH_PREFIX + kind


def _union(message: str) -> Discriminator:
    return Discriminator(_branch, custom_error_type="wrong_type", custom_error_message=message)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# In JSON 16.0 is a whole number too, and some clients write it. Token ids, of which there may be millions, are spared the call.
Integer = Annotated[int, BeforeValidator(_whole)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Prompt = Annotated[
    Annotated[str, Tag("@text")]
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag("@texts")]
    | Annotated[list[TokenId], Field(fail_fast=True, min_length=1), Tag("@ids")]
    | Annotated[
        list[Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]],
        Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS),
        Tag("@id lists"),
    ],
    _union("must be a string, a list of strings, a list of token ids, or a list of lists of token ids"),
]
Timeout = Annotated[float, Field(gt=0, le=86400)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    Annotated[StopString, Tag("@text")]
    | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS), Tag("@texts")]
    | Annotated[None, Tag("@null")],
    Discriminator(
        lambda value: "@null" if value is None else _branch(value),
        custom_error_type="wrong_type",
        custom_error_message="must be a string or a list of strings",
    ),
]


class StreamOptions(Schema):
    include_usage: bool | None = Field(None, description="A last chunk without choices carries the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Every chunk carries the usage so far.")


class JsonSchemaFormat(Schema):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = Field(None, description="Outputs follow the schema always.")


class PlainFormat(Schema):
    type: Literal["text", "json_object"]


class SchemaFormat(Schema):
    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


ResponseFormat = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Schema):
    """Exactly one of these."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema.")
    json_object: bool | None = None
    regex: str | None = Field(None, min_length=1)
    choice: Annotated[list[StopString], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: str | None = Field(None, min_length=1, description="GBNF (EBNF with ::=) or Lark.")


class GenerationFields(Schema):
    """What completions and chat have in common."""

    model: str | None = Field(None, description="A served model's name; null is the server's.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; from 0 to 0.01 counts as 0.01.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=-1, le=2**31 - 1, description="0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1, description="Locally typical sampling; 1 is off.")
    seed: Integer | None = Field(None, ge=-(2**63), le=2**63 - 1, description="Choice i of a prompt uses seed + i.")
    n: Integer | None = Field(None, ge=1, le=MAX_CHOICES_PER_PROMPT)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Integer | None = Field(None, ge=0, le=2**31 - 1)
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(
        None, max_length=1024, description="Prompts share cached blocks only within one salt."
    )
    user: str | None = Field(None, description="Accepted for compatibility; identifies your user to you.")

    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="1 is off; counts the prompt too.")
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = Field(
        None, description="By token id, as a string."
    )
    allowed_token_ids: Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=2**20)] | None = None
    bad_words: Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_BAD_WORDS)] | None = None
    timeout: Timeout | None = Field(
        None, description="Seconds, after which the answer ends as it is, with finish_reason timeout."
    )
    include_metrics: bool | None = Field(None, description="The answer's `metrics`: how long it waited and took.")
    prompt_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Not with stream.")
    truncate_prompt_tokens: Integer | None = Field(
        None, ge=-1, le=2**31 - 1, description="How many of the prompt's last tokens to keep; -1: as many as fit."
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="Not together with response_format.")
    length_penalty: OnlyOne = None
    use_beam_search: OnlyFalse = None
    spaces_between_special_tokens: OnlyTrue = None
    priority: Integer | None = Field(
        None, ge=-1000, le=1000, description="The lower goes first. Needs --scheduling-policy priority, unless 0."
    )


class CompletionRequest(GenerationFields):
    prompt: Prompt = Field(description="One prompt, or several; text or token ids.")
    max_tokens: Integer | None = Field(
        None, ge=0, le=2**31 - 1, description="The rest of the context unless given; 0 only with echo."
    )
    echo: bool | None = None
    add_special_tokens: bool | None = Field(None, description="Whether the tokenizer may add its own (BOS); true.")

    best_of: OnlyOne = None
    suffix: OnlyEmptyString = None
    logprobs: Integer | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="How many of the likeliest tokens to tell with each token."
    )


class TextPart(Schema):
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("@text")]
    | Annotated[list[TextPart], Field(fail_fast=True), Tag("@parts")]
    | Annotated[None, Tag("@null")],
    Discriminator(
        lambda value: "@null" if value is None else "@parts" if value == [] else _branch(value),
        custom_error_type="wrong_type",
        custom_error_message="must be a string or a list of text parts",
    ),
]

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class CalledFunction(Schema):
    name: ToolName
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Schema):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = Field(
        None, description="Of an assistant's message."
    )
    tool_call_id: str | None = Field(None, description="Of a tool's message.")
    reasoning_content: str | None = None

    # What clients send back of an assistant's message.
    refusal: OnlyNull = None
    annotations: OnlyEmptyList = None
    audio: OnlyNull = None
    function_call: OnlyNull = None

    def text(self) -> str:
        """The content as one string."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class FunctionDefinition(Schema):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool | None = Field(None, description="Arguments of required and named calls follow the schema always.")


class Tool(Schema):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Schema):
    name: ToolName


class NamedToolChoice(Schema):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("@word")] | Annotated[NamedToolChoice, Tag("@function")],
    Discriminator(
        lambda value: "@word" if isinstance(value, str) else "@function" if isinstance(value, dict) else None,
        custom_error_type="wrong_type",
        custom_error_message='must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
    ),
]


class ChatPromptFields(Schema):
    """What a chat's prompt is made of."""

    messages: list[Message] = Field(fail_fast=True, min_length=1)
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = Field(
        None, description="Whether the prompt ends where an answer begins; true unless continue_final_message."
    )
    continue_final_message: bool | None = Field(None, description="The answer goes on from the last message's text.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More variables for the chat template.")


class ChatRequest(GenerationFields, ChatPromptFields):
    max_tokens: Integer | None = Field(None, ge=1, le=2**31 - 1, description="The rest of the context unless given.")
    max_completion_tokens: Integer | None = Field(None, ge=1, le=2**31 - 1, description="Goes before max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Needs logprobs.")
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call.")
    include_reasoning: bool | None = Field(None, description="Whether reasoning is told at all; true.")
    safety_identifier: str | None = Field(None, description="Accepted for compatibility, as `user`.")
    prompt_cache_key: str | None = Field(None, description="Accepted for compatibility: prefixes are cached always.")

    functions: OnlyEmptyList = None
    function_call: Annotated[Any, *_only(None, "none", "auto")] = None
    modalities: Annotated[Any, *_only(None, ["text"])] = None
    audio: OnlyNull = None
    prediction: OnlyNull = None
    reasoning_effort: OnlyNull = None
    chat_template: OnlyNull = None
    echo: OnlyFalse = None
    add_special_tokens: OnlyFalse = None
    store: OnlyFalse = None
    metadata: OnlyEmptyObject = None
    service_tier: Annotated[Any, *_only(None, "auto", "default")] = None


class TokenizeRequest(ChatPromptFields):
    """A prompt, or a chat's messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)] | None = Field(None)  # type: ignore[assignment]
    add_special_tokens: bool | None = Field(None, description="For prompts; true.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Schema):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=2**17)]  # decoding keeps the server from all else
