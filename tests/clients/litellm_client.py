"""LiteLLM against the server whose URL is the first argument."""

from __future__ import annotations

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it asks GitHub at import otherwise

import litellm

URL = sys.argv[1]
OPENAI = {"model": "openai/demo", "api_base": URL + "/v1", "api_key": "none", "num_retries": 0}
VLLM = {"model": "hosted_vllm/demo", "api_base": URL + "/v1", "api_key": "none", "num_retries": 0}
MESSAGES = [{"role": "user", "content": "Name a colour."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def chat() -> None:
    for provider in (OPENAI, VLLM):
        answer = litellm.completion(messages=MESSAGES, temperature=0, max_tokens=16, **provider)
        text = answer.choices[0].message.content
        assert text and 0 < answer.usage.completion_tokens <= 16, answer
        stream = litellm.completion(
            messages=MESSAGES,
            temperature=0,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
            **provider,
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        assert any(getattr(chunk, "usage", None) for chunk in chunks)
        again = asyncio.run(litellm.acompletion(messages=MESSAGES, temperature=0, max_tokens=16, **provider))
        assert again.choices[0].message.content == text
        two = litellm.completion(
            messages=MESSAGES, n=2, max_tokens=4, seed=3, logprobs=True, top_logprobs=2, **provider
        )
        assert len(two.choices) == 2 and len(two.choices[0].logprobs.content[0].top_logprobs) == 2


def tools() -> None:
    fields = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 200, "temperature": 0}
    answer = litellm.completion(messages=MESSAGES, **fields, **OPENAI)
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "weather" and "city" in json.loads(call.function.arguments)
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, **fields, **OPENAI))
    built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert built.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    assert built.choices[0].finish_reason == answer.choices[0].finish_reason == "tool_calls"


def structured() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9999}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}}
    answer = litellm.completion(
        messages=MESSAGES, response_format=form, max_tokens=200, temperature=1, seed=1, **OPENAI
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["n"], int)


def others() -> None:
    text = litellm.text_completion(
        model="text-completion-openai/demo", prompt="One, two,", api_base=URL + "/v1", api_key="none", max_tokens=5
    )
    assert text.choices[0].text
    vectors = litellm.embedding(input=["the cat", "a dog"], **OPENAI)
    assert len(vectors.data) == 2 and vectors.data[0]["embedding"] != vectors.data[1]["embedding"]
    message = litellm.completion(
        model="anthropic/demo", api_base=URL, api_key="none", messages=MESSAGES, max_tokens=8, temperature=0
    )
    assert message.choices[0].message.content
    answer = litellm.responses(input="Name a colour.", max_output_tokens=16, **OPENAI)
    assert answer.output


def errors() -> None:
    for fields, error in (
        ({"model": "openai/nobody"}, litellm.NotFoundError),
        ({"temperature": 9}, litellm.BadRequestError),
    ):
        try:
            litellm.completion(messages=MESSAGES, max_tokens=4, **{**OPENAI, **fields})
        except error:
            continue
        raise AssertionError(f"no {error}")


for part in (chat, tools, structured, others, errors):
    part()
    print(part.__name__, "ok", flush=True)
