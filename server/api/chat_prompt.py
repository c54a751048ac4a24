"""From a chat's messages to its prompt's text."""

from __future__ import annotations

import json
from typing import Any

from server.api.chat_template import ChatTemplateError
from server.api.context import ApiContext
from server.api.errors import RequestError
from server.api.schemas import ChatPromptFields, Message, Tool


def render_prompt(body: ChatPromptFields, context: ApiContext, tools: list[Tool] | None) -> str:
    """Raises RequestError naming the field that the template cannot make a prompt of."""
    template = context.chat_template
    if template is None:
        raise RequestError(
            f"The model `{context.model_names[0]}` has no chat template; use /v1/completions, or start the server with "
            "--chat-template",
            param="messages",
        )
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise RequestError(
            "continue_final_message: not together with add_generation_prompt", param="continue_final_message"
        )
    if tools and not template.knows_tools:
        raise RequestError("tools: the model's chat template does not know tools", param="tools")
    if body.messages is None:
        raise RequestError("messages: field required", param="messages")
    messages = [_message(message, index) for index, message in enumerate(body.messages)]
    if continues:
        # Templates trim texts and go on after them: the mark tells where the text ends in what they make of it.
        if not messages[-1]["content"]:
            raise RequestError("continue_final_message: the last message has no text", param="messages")
        messages[-1]["content"] += _END_MARK
    variables = dict(body.chat_template_kwargs or {})
    for name in ("messages", "add_generation_prompt", *(("tools",) if tools else ())):
        if name in variables:
            field = f"chat_template_kwargs.{name}"
            raise RequestError(f"{field}: the request has a field of its own for it", param=field)
    if tools:
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    add_generation_prompt = body.add_generation_prompt is not False and not continues
    try:
        text = template.render(messages, add_generation_prompt, variables)
    except ChatTemplateError as error:
        raise RequestError(str(error), param="messages") from None
    if not continues:
        return text
    position = text.rfind(_END_MARK)
    if position < 0:
        raise RequestError(
            "continue_final_message: the chat template does not show the last message's text", param="messages"
        )
    return text[:position]


_END_MARK = "\ue000end of the text to continue\ue000"


def _message(message: Message, index: int) -> dict[str, Any]:
    """As templates expect it: content as text, arguments as objects."""
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        field = f"messages.{index}.content"
        raise RequestError(f"{field}: must be a string or a list of text parts", param=field)
    if message.tool_calls and message.role != "assistant":
        field = f"messages.{index}.tool_calls"
        raise RequestError(f"{field}: only for assistants' messages", param=field)
    made: dict[str, Any] = {"role": message.role, "content": message.text()}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            made[name] = value
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments, index)},
            }
            for call in message.tool_calls
        ]
    return made


def _arguments(text: str, index: int) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        field = f"messages.{index}.tool_calls"
        raise RequestError(f"{field}: arguments must be a JSON object, as text", param=field)
    return arguments
