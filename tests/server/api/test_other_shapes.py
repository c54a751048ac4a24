"""The Responses and Messages APIs, through the clients that people use and against what they leave out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from server.api.chat_template import ChatTemplate
from server.api.tools import TOOL_FORMATS
from tests.server.fakes import byte_level_tokenizer, echo_engine, served_edge

CALL = '<tool_call>{"name": "now", "arguments": {"zone": "x"}}</tool_call>'
# The engine echoes its prompt: the last message's text, so that tests say what the model says.
TEMPLATE = "{# tools <tool_call> #}{% if messages | length > 1 %}{% endif %}{{ messages[-1].content }}"
TOOL_SCHEMA = {"type": "object", "properties": {"zone": {"type": "string"}}}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    fields = {"tool_format": TOOL_FORMATS["hermes"], "parses_reasoning": True}
    with served_edge(echo_engine(), chat_template=ChatTemplate(TEMPLATE), **fields) as (url, _):
        yield url


def length(text: str) -> int:
    return len(byte_level_tokenizer().encode(text))


SAID = "<think>hm</think>The fox." + CALL


def test_messages_whole_and_streamed(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    request: dict[str, Any] = {
        "model": "echo", "max_tokens": length(SAID), "messages": [{"role": "user", "content": SAID}],
        "system": "Be brief.", "tools": [{"name": "now", "input_schema": TOOL_SCHEMA, "strict": True}],
        "service_tier": "auto", "cache_control": {"type": "ephemeral"},
    }  # fmt: skip
    message = client.messages.create(**request)
    thinking, text, call = message.content
    assert (thinking.thinking, text.text, call.name, call.input) == ("hm", "The fox.", "now", {"zone": "x"})
    assert message.stop_reason == "max_tokens" and message.usage.output_tokens == length(SAID)
    with client.messages.stream(**request) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use"]
    assert streamed.content[2].input == {"zone": "x"} and streamed.content[1].text == "The fox."
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert streamed.usage.output_tokens == length(SAID)


def test_messages_stop_and_go_on(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    user = {"role": "user", "content": [{"type": "text", "text": "The quick fox."}]}
    message = client.messages.create(model="echo", max_tokens=50, messages=[user], stop_sequences=["fox"])
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == (
        "The quick ",
        "stop_sequence",
        "fox",
    )
    prefilled = [user, {"role": "assistant", "content": "The lazy dog "}]
    message = client.messages.create(model="echo", max_tokens=2, messages=prefilled)
    assert message.usage.input_tokens == length("The lazy dog ")
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "noon"}]}
    use = {"type": "tool_use", "id": "1", "name": "now", "input": {}}
    history = [user, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    assert client.messages.create(model="echo", max_tokens=length("noon"), messages=history).content[0].text == "noon"
    assert client.messages.count_tokens(model="echo", messages=history).input_tokens == length("noon")


def test_messages_errors_have_their_own_shape(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="other", max_tokens=5, messages=[{"role": "user", "content": "a"}])
    assert missing.value.body["error"]["type"] == "not_found_error"
    for fields, part in (
        ({"max_tokens": 0}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice: needs tools"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name: goes with"),
        ({"tool_choice": {"type": "auto", "name": "x"}}, "tool_choice.name: goes with"),
    ):
        body = {"model": "echo", "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]} | fields
        answer = httpx.post(f"{url}/v1/messages", json=body)
        error = answer.json()
        assert answer.status_code == 400 and error["type"] == "error", error
        assert error["error"]["type"] == "invalid_request_error" and part in error["error"]["message"], error
    for method, path, status in (("GET", "/v1/messages", 405), ("POST", "/v1/messages/batches", 404)):
        answer = httpx.request(method, url + path)
        assert answer.status_code == status and answer.json()["type"] == "error", answer.text
    assert httpx.get(f"{url}/v1/messages").headers["allow"] == "POST"


def test_responses_whole_and_streamed(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    request: dict[str, Any] = {
        "model": "echo", "input": SAID, "max_output_tokens": length(SAID), "instructions": "Be brief.",
        "tools": [{"type": "function", "name": "now", "parameters": TOOL_SCHEMA}], "metadata": {"a": "b"},
    }  # fmt: skip
    response = client.responses.create(**request)
    reasoning, message, call = response.output
    assert reasoning.content[0].text == "hm" and response.output_text == "The fox." and message.role == "assistant"
    assert call.name == "now" and json.loads(call.arguments) == {"zone": "x"}
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == length(SAID) and response.metadata == {"a": "b"}
    with client.responses.stream(**request) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "The fox."
    final = events[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    for output in (response.output, final.output, [event.item for event in events if event.type.endswith("item.done")]):
        assert [item.status for item in output] == ["completed", "completed", "incomplete"]  # only the last is cut


def test_responses_of_a_conversation(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "what time is it"}]},
        {"type": "function_call", "call_id": "1", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "The dog."}]},
    ]
    response = client.responses.create(
        model="echo", input=items, max_output_tokens=length("The dog."), prompt_cache_key="a", safety_identifier="b"
    )
    assert response.output_text == "The dog."
    openai.types.responses.Response.model_validate(response.model_dump())  # clients take what comes; types do not
    for fields, param in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"input": []}, "input"),
        ({"input": [{"type": "image"}]}, "input.0"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": 5}]}, "input.0.output"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ):
        answer = httpx.post(f"{url}/v1/responses", json={"input": "a"} | fields)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
